"""Compile the kernels for GPUs that are not there, and judge their shared memory; run by test_kernels.py."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from starquant.kernels.tiles import row_rule, rule
from starquant.kernels.tokens import Kronecker
from starquant.kernels.triton.heads import HEADS
from starquant.kernels.triton.heads import _turn as _turn_heads
from starquant.kernels.triton.linear import _finish, _linear
from starquant.kernels.triton.quantize import _map_rows, _quantize_rows
from starquant.kernels.triton.transform import _transform_rows, shape_of, sides

#: Shared memory of a block, KB: the least of what capability 8.6 and 8.9 have.
SHARED = 99 * 1024
OFFSETS = ("x_zero_ptr", "x_sum_ptr", "w_offsets_ptr")
POINTERS = ("x_ptr", "w_ptr", "x_scale_ptr", "w_scale_ptr", "bias_ptr", *OFFSETS, "residual_ptr", "y_ptr")
LINEAR = (*POINTERS, "rows", "outputs", "columns", "split")


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, object],
    capability: int,
    warps: int,
    stages: int,
    **more: int,
) -> Any:
    usual = {"EARLY": capability >= 90, "FAST": True}
    constants = {name: value for name, value in usual.items() if name in kernel.arg_names} | constants
    kinds = types | dict.fromkeys(constants, "constexpr")
    order = list(kernel.arg_names)
    signature = {name: kinds[name] for name in order}
    constexprs = {(order.index(name),): value for name, value in constants.items()}
    whole = {(order.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind != "fp32"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=whole)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages} | more)


def check_linear(capability: int) -> None:
    """Every kind of tile that the rule gives: it fits, and multiplies on tensor cores what it unpacks in registers."""
    seen = set()
    kinds = (True, 4, False), (True, 4, True), (True, 8, False), (True, 8, True), (True, 3, False)
    kinds += (False, 4, False), (False, 8, False)
    for rows, outputs, (integer, bits, zero) in itertools.product((1, 8, 32, 64, 1024), (1024, 12288), kinds):
        columns = 2048 if bits <= 4 else 4096
        tile = rule(rows, outputs, columns, integer, 132)
        if (tile, integer, bits, zero, rows == 1) in seen:
            continue
        seen.add((tile, integer, bits, zero, rows == 1))
        out = "bf16" if tile.split == 1 else "i32" if integer else "fp32"
        offsets = ["i32" if zero else "fp32"] * 3
        pointed = ("i8" if integer else "bf16", "u8", "fp32", "fp32", "bf16", *offsets, "bf16", out)
        types = {name: "i32" for name in LINEAR} | {n: f"*{k}" for n, k in zip(POINTERS, pointed, strict=True)}
        even = columns % (tile.j * tile.split) == 0
        constants = {"BITS": bits, "FAST": bits in (4, 8), "INTEGER": integer, "HAS_BIAS": True, "EVEN": even}
        constants |= {"HAS_ZERO": zero, "HAS_SUM": zero, "HAS_RESIDUAL": True}
        if tile.split == 1:  # Triton takes a 1 as a constant
            del types["split"]
            constants["split"] = 1
        if rows == 1:
            del types["rows"]
            constants["rows"] = 1
        constants |= {"PARTIAL": tile.split > 1, "BLOCK_M": tile.m, "BLOCK_O": tile.o, "BLOCK_J": tile.j}
        found = compiled(_linear, types, constants, capability, tile.warps, tile.stages)
        assert found.metadata.shared <= SHARED, (capability, tile, integer, bits, found.metadata.shared)
        wanted = "mma.sync" if capability < 90 else "wgmma.mma_async"
        assert wanted in found.asm["ptx"], "no tensor cores"
        if capability == 90 and integer and bits == 4:
            left = re.search(r"wgmma\.mma_async\S* \{[^}]*\}, (.)", found.asm["ptx"])
            assert left is not None and left[1] == "{", "weights do not come from registers"


def check_finish(capability: int) -> None:
    """Where sums of several programs are added; also of one row, which Triton takes as a constant."""
    pointers = {"parts_ptr": "*i32", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    for one, zero in itertools.product((False, True), repeat=2):
        types = pointers | dict.fromkeys(OFFSETS, "*i32") | {"residual_ptr": "*bf16", "y_ptr": "*bf16"}
        types |= ({} if one else {"rows": "i32"}) | {"outputs": "i32"}
        constants = {
            "INTEGER": True,
            "HAS_BIAS": True,
            "HAS_ZERO": zero,
            "HAS_SUM": zero,
            "HAS_RESIDUAL": True,
            "SPLIT": 4,
            "BLOCK": 1024,
        }
        constants |= {"rows": 1} if one else {}
        compiled(_finish, types, constants, capability, 4, 2)


def check_quantize(capability: int) -> None:
    pointers = {
        "x_ptr": "*bf16",
        "front_ptr": "*bf16",
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        "clip_ptr": "*fp32",
        "state_ptr": "*i64",
    }
    pointers |= {"zero_ptr": "*i32", "sum_ptr": "*i32"}
    numbers = {"shared": "i32", "d_m": "i32", "x_stride": "i32", "front_stride": "i32"}
    floats = dict.fromkeys(("eps", "qmax", "reach", "tiny"), "fp32")
    constants = {"CLIP": 2, "HAS_GATE": True, "BLOCK": 4096}
    for symmetric, norm in itertools.product((True, False), repeat=2):
        grid = {"SYMMETRIC": symmetric, "SUMS": not symmetric, "SWIGLU": not norm, "NORM": norm}
        types = pointers | {"width": "i32"} | numbers | floats
        compiled(_quantize_rows, types, constants | grid, capability, 16, 3)


def check_map(capability: int) -> None:
    types = {"x_ptr": "*bf16", "matrix_ptr": "*fp32", "shift_ptr": "*fp32", "y_ptr": "*bf16"}
    types |= dict.fromkeys(("rows", "width", "span"), "i32")
    for rows in (16, 64):
        found = compiled(_map_rows, types, {"GROUP": 16, "ROWS": rows, "BLOCK": 64}, capability, 4, 3)
        assert found.metadata.shared <= SHARED and "mma" in found.asm["ptx"]


def check_transform(capability: int) -> None:
    """The widths of LLaDA-8B and Dream-7B: Hadamards, learned Kronecker factors, heads."""
    sizes = (64, 64), (96, 128), (56, 64), (128, 148), (148, 128), (32, None), (28, None)
    for (m, n), symmetric, rows in itertools.product(sizes, (True, False), (16, 1024)):
        norm = m * (n or 0) in (3584, 4096)  # what is read behind a norm; SwiGLU stands in front of the others
        kronecker = Kronecker(torch.empty(m, m), None if n is None else torch.empty(n, n))
        settings = row_rule(rows, m * (n or 128), m, n, 132)
        _, right, a, b, stride_a, _ = sides(kronecker, m * (n or 128), settings)
        types = {
            "x_ptr": "*bf16",
            "front_ptr": "*bf16",
            "left_ptr": "*fp32",
            "right_ptr": "*fp32",
            "codes_ptr": "*i8",
            "scale_ptr": "*fp32",
        }
        types |= {"clip_ptr": "*fp32", "state_ptr": "*i64", "shared": "i32", "d_m": "i32"}
        types |= {"x_stride": "i32", "front_stride": "i32"}
        types |= dict.fromkeys(("rows", "width", "a", "b"), "i32")
        types |= dict.fromkeys(("factor", "eps", "qmax", "reach", "tiny"), "fp32") | {
            "zero_ptr": "*i32",
            "sum_ptr": "*i32",
        }
        along, across = ("stride_a", "stride_b") if stride_a == 1 else ("stride_b", "stride_a")
        types |= {across: "i32"}
        shape = shape_of(a, b, settings)
        options = [shape.pop("num_warps"), shape.pop("num_stages")]
        most = {"maxnreg": shape.pop("maxnreg")}
        constants = {
            "HAS_RIGHT": right is not None,
            "CLIP": 1,
            "HAS_GATE": True,
            "SWIGLU": not norm,
            "NORM": norm,
            along: 1,
        } | shape
        constants |= {"SYMMETRIC": symmetric, "SUMS": not symmetric}
        found = compiled(_transform_rows, types, constants, capability, *options, **most)
        assert found.metadata.shared <= SHARED, (capability, a, b, found.metadata.shared)
        assert "mma" in found.asm["ptx"], "no tensor cores"


def check_heads(capability: int) -> None:
    """Heads of both families, all turned, without norms and with."""
    outer = {f"{x}_{part}_ptr": "*bf16" for x in "qk" for part in ("gain", "out")}
    types = {"q_ptr": "*bf16", "k_ptr": "*bf16", **outer, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("positions", "q_heads", "k_heads", "q_stride", "k_stride", "width", "turned"), "i32")
    for norm in (False, True):
        compiled(_turn_heads, types, {"NORM": norm, "HEADS": HEADS, "BLOCK": 128}, capability, 4, 3)


if __name__ == "__main__":
    for capability in (80, 89, 90):
        check_linear(capability)
        check_transform(capability)
        check_finish(capability)
        check_map(capability)
        check_heads(capability)
    check_quantize(90)
    print("all compiled")
