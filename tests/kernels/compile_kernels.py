"""Compile the kernels for GPUs that are not there, and judge their shared memory; run by test_kernels.py."""

from __future__ import annotations

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from starquant.kernels.triton_linear import _linear, tile
from starquant.kernels.triton_quantize import _quantize_rows

#: Shared memory of a block, KB: the least of what capability 8.6 and 8.9 have.
SHARED = 99 * 1024
LINEAR = ("x_ptr", "w_ptr", "x_scale_ptr", "w_scale_ptr", "bias_ptr", "y_ptr", "rows", "outputs", "width", "offset")


def compiled(
    kernel: object, types: dict[str, str], constants: dict[str, object], capability: int, warps: int, stages: int
):
    signature = types | dict.fromkeys(constants, "constexpr")
    order = list(signature)
    constexprs = {(order.index(name),): value for name, value in constants.items()}
    pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=pointers)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def check_linear(capability: int) -> None:
    for rows, (integer, halved) in itertools.product((16, 64, 128), ((True, True), (True, False), (False, True))):
        settings = tile(rows, integer)
        x = "i8" if integer else "bf16"
        kinds = (x, "u8", "fp32", "fp32", "bf16", "bf16")
        types = {name: "i32" for name in LINEAR} | {n: f"*{k}" for n, k in zip(LINEAR, kinds, strict=False)}
        constants = {"HALVED": halved, "INTEGER": integer, "HAS_BIAS": True}
        constants |= {name: settings[name] for name in ("BLOCK_M", "BLOCK_O", "BLOCK_J")}
        found = compiled(_linear, types, constants, capability, settings["num_warps"], settings["num_stages"])
        assert found.metadata.shared <= SHARED, (capability, rows, integer, halved, found.metadata.shared)
        assert "mma" in found.asm["ptx"], "no tensor cores"


def check_quantize(capability: int) -> None:
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "clip_ptr": "*fp32", "state_ptr": "*i8"}
    types |= {"matrix_ptr": "*fp32", "shift_ptr": "*fp32", "width": "i32", "shared": "i32", "masked": "i32"}
    types |= {"qmax": "fp32", "per_code": "fp32", "tiny": "fp32"}
    constants = {"HAS_CLIP": True, "HAS_GATE": True, "GROUP": 16, "BLOCK": 16384}
    compiled(_quantize_rows, types, constants, capability, 16, 3)


if __name__ == "__main__":
    for capability in (80, 89, 90):
        check_linear(capability)
    check_quantize(90)
    print("all compiled")
