"""Triton: an online transform x (A (x) B) of rows, their gates and their per-token quantization in one pass.

Hadamard transforms (A and B of signs) and learned Kronecker P alike. A program holds A and B, and takes one row after
another as tiles [a, some columns of b]: it multiplies them from both sides on tensor cores, and writes int8 codes and
the row's grid; a row is read once, its codes are written once, and nothing between goes through memory. Operands are
float16 (11 bits, against the 8 of bfloat16 that results are rounded to), rows divided by the power of two next to their
largest number, which is exact and leaves room; sums are float32. Rows of float32 are PyTorch's to transform.
"""

from __future__ import annotations

import itertools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.tiles import REGISTERS, RowTile, processors, row_tile
from starquant.kernels.tokens import Kronecker, Norm, TokenStates
from starquant.kernels.triton.launch import early_arguments, start
from starquant.kernels.triton.rows import (
    clipped_scale_of,
    codes_from_zero,
    codes_of,
    ends_of,
    front_arguments,
    gated,
    grid_arguments,
    largest_bits,
    moved,
    normed,
    row_targets,
    rows_of,
    scale_of,
    state_arguments,
    swiglu,
)


@triton.jit
def power_of_two(bits):
    """Return the power of two at or below a magnitude, of its bits, and its reciprocal; of 0 and infinity too."""
    exponent = (bits >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _transform_rows(
    x_ptr,
    front_ptr,
    left_ptr,
    right_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    sum_ptr,
    clip_ptr,
    state_ptr,
    rows,
    width,
    a,
    b,
    stride_a,
    stride_b,
    x_stride,
    front_stride,
    shared,
    d_m,
    factor,
    eps,
    qmax,
    reach,
    tiny,
    FAST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SWIGLU: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    A: tl.constexpr,
    COLUMNS: tl.constexpr,
    STARTS: tl.constexpr,
    TILES: tl.constexpr,
):
    start(EARLY)
    i, k = tl.arange(0, A), tl.arange(0, A)
    left = tl.load(left_ptr + k[None, :] * a + i[:, None], mask=(k < a)[None, :] & (i < a)[:, None], other=0.0)
    left = left.to(tl.float16)
    if TILES == 1:  # read once; of several tiles there are too many to hold
        c = tl.arange(0, COLUMNS[0])
        if HAS_RIGHT:
            square = (c < b)[:, None] & (c < b)[None, :]
            right = tl.load(right_ptr + c[:, None] * b + c[None, :], mask=square, other=0.0).to(tl.float16)
        if NORM:
            gain = tl.load(
                front_ptr + k[:, None] * stride_a + c[None, :] * stride_b,
                mask=(k < a)[:, None] & (c < b)[None, :],
                other=0.0,
            )
    first, programs = tl.program_id(0), tl.num_programs(0)
    for turn in range(0, tl.cdiv(rows - first, programs)):
        row = first + turn * programs
        long = row.to(tl.int64)
        state = tl.load(state_ptr + row) if HAS_GATE or CLIP > 0 else 0
        of_high = tl.load(clip_ptr + CLIP * state) if CLIP > 0 else 1.0
        of_low = tl.load(clip_ptr + CLIP * state + 1) if CLIP == 2 else of_high
        bits, squares = 0, 0.0
        xs = ()
        for n in tl.static_range(TILES):
            c = STARTS[n] + tl.arange(0, COLUMNS[n])
            at = k[:, None] * stride_a + c[None, :] * stride_b
            inside = (k < a)[:, None] & (c < b)[None, :]
            x = tl.load(x_ptr + long * x_stride + at, mask=inside, other=0.0)
            if NORM:
                squares += tl.sum(x.to(tl.float32) * x.to(tl.float32))
            else:
                if SWIGLU:
                    x = swiglu(x, tl.load(front_ptr + long * front_stride + at, mask=inside, other=0.0), FAST)
                x = x.to(tl.float32)
                bits = tl.maximum(bits, largest_bits(x))
            xs += (x,)
        if NORM:
            new = ()
            for n in tl.static_range(TILES):
                if TILES > 1:
                    c = STARTS[n] + tl.arange(0, COLUMNS[n])
                    at = k[:, None] * stride_a + c[None, :] * stride_b
                    inside = (k < a)[:, None] & (c < b)[None, :]
                    x = normed(xs[n], tl.load(front_ptr + at, mask=inside, other=0.0), squares, width, eps)
                else:
                    x = normed(xs[n], gain, squares, width, eps)
                bits = tl.maximum(bits, largest_bits(x))
                new += (x,)
            xs = new
        times, over = power_of_two(bits)
        ys = ()
        for n in tl.static_range(TILES):
            u = tl.dot(left, (xs[n] * over).to(tl.float16))
            if HAS_RIGHT:
                u = u.to(tl.float16)
                new = ()
                for m in tl.static_range(TILES):
                    if TILES > 1:
                        c = STARTS[n] + tl.arange(0, COLUMNS[n])
                        d = STARTS[m] + tl.arange(0, COLUMNS[m])
                        square = (c < b)[:, None] & (d < b)[None, :]
                        right_at = right_ptr + c[:, None] * b + d[None, :]
                        part = tl.load(right_at, mask=square, other=0.0).to(tl.float16)
                        new += ((tl.dot(u, part) if n == 0 else tl.dot(u, part, ys[m])),)
                    else:
                        new += (tl.dot(u, right),)
                ys = new
            else:
                ys += (u,)
        bits, smallest, largest, strange = 0, 0.0, 0.0, 0
        done = ()
        for m in tl.static_range(TILES):
            y = (ys[m] * (factor * times)).to(x_ptr.dtype.element_ty).to(tl.float32)
            if HAS_GATE:
                c = STARTS[m] + tl.arange(0, COLUMNS[m])
                channel = i[:, None] * stride_a + c[None, :] * stride_b
                y = gated(y, channel, state, shared, d_m, width)
            done += (y,)
            if SYMMETRIC and CLIP < 2:
                bits = tl.maximum(bits, largest_bits(y))
            else:
                smallest, largest = tl.minimum(smallest, tl.min(y)), tl.maximum(largest, tl.max(y))
                strange += tl.sum((y != y).to(tl.int32))
        zero = 0.0
        if SYMMETRIC and CLIP < 2:
            scale = scale_of(bits, of_high, reach, tiny)
        elif SYMMETRIC:
            scale = clipped_scale_of(smallest, largest, strange, of_low, of_high, reach, tiny)
        else:
            scale, zero = ends_of(smallest, largest, strange, of_low, of_high, reach, qmax, tiny)
            tl.store(zero_ptr + row, moved(zero, qmax))
        total = 0
        for m in tl.static_range(TILES):
            if SYMMETRIC:
                codes = codes_of(done[m], scale, qmax, FAST)
            else:
                codes = codes_from_zero(done[m], scale, zero, qmax, FAST)
            c = STARTS[m] + tl.arange(0, COLUMNS[m])
            inside = (i < a)[:, None] & (c < b)[None, :]
            at = codes_ptr + long * width + i[:, None] * stride_a + c[None, :] * stride_b
            tl.store(at, codes, mask=inside)
            if SUMS:
                total += tl.sum(tl.where(inside, codes.to(tl.int32), 0))
        if SUMS:
            tl.store(sum_ptr + row, total)
        tl.store(scale_ptr + row, scale)


def transform_rows(
    x_MK: Tensor,
    bits: int,
    clip_ratio: float,
    kronecker: Kronecker,
    states: TokenStates | None,
    symmetric: bool = True,
    sums: bool = False,
    front: Tensor | Norm | None = None,
    settings: RowTile | None = None,
) -> tuple[Tensor, ...]:
    """Return transformed rows of 16 bits as `reference.quantize_rows` does; arguments as `quantize_rows`.

    `settings` are those of the launch; None for those of `tiles.row_tile`.
    """
    x_MK = rows_of(x_MK)
    rows, width = x_MK.shape
    codes, scale, *offsets = row_targets(x_MK, symmetric, sums)
    clip, state, gate, flags = state_arguments(states, width, scale)
    in_front, front_stride, eps, kind = front_arguments(front, x_MK)
    if settings is None:
        factors = len(kronecker.a_MM), None if kronecker.b_NN is None else len(kronecker.b_NN)
        settings = row_tile(rows, width, *factors, x_MK.device)
    left, right, a, b, *strides = sides(kronecker, width, settings)
    programs = processors(x_MK.device) * max(1, REGISTERS // (32 * settings.warps * settings.registers))
    _transform_rows[(min(rows, programs),)](
        x_MK,
        in_front,
        left.contiguous(),
        scale if right is None else right.contiguous(),
        codes,
        scale,
        scale if symmetric else offsets[0],
        offsets[-1] if sums else scale,
        clip,
        state,
        rows,
        width,
        a,
        b,
        *strides,
        x_MK.stride(0),
        front_stride,
        *gate,
        kronecker.factor,
        eps,
        *grid_arguments(bits, clip_ratio, symmetric),
        FAST=x_MK.is_cuda,
        SYMMETRIC=symmetric,
        SUMS=sums,
        HAS_RIGHT=right is not None,
        **flags,
        **kind,
        **shape_of(a, b, settings),
        **early_arguments(x_MK),
    )
    return codes, scale, *offsets


def sides(kronecker: Kronecker, width: int, settings: RowTile) -> tuple[Tensor, Tensor | None, int, int, int, int]:
    """Return the factor on the left and on the right of a row, their sizes, and the strides of its tiles."""
    left, right = kronecker.a_MM, kronecker.b_NN
    a = len(left)
    b = width // a
    if right is not None and settings.turned:
        return right, left, b, a, 1, b
    return left, right, a, b, b, 1


def shape_of(a: int, b: int, settings: RowTile) -> dict[str, Any]:
    """Return tiles and launch settings of a row [a, b], as it is multiplied."""
    columns = settings.columns
    assert sum(columns) >= b, (columns, b)
    starts = tuple(itertools.accumulate((0, *columns[:-1])))
    tiles = {"A": max(16, triton.next_power_of_2(a)), "COLUMNS": columns, "STARTS": starts, "TILES": len(columns)}
    return tiles | {"num_stages": 1, "num_warps": settings.warps, "maxnreg": settings.registers}
