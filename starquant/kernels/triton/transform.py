"""Triton: an online transform x (A (x) B) of rows, their gates and their per-token quantization in one pass.

Hadamard transforms (A and B of signs) and learned Kronecker P alike. A program holds A and B, and takes one row after
another as tiles [a, columns of b]: it multiplies them from both sides on tensor cores, and writes int8 codes and the
row's grid; a row is read once, its codes are written once, and nothing between goes through memory. Operands are
float16 (11 bits, against the 8 of bfloat16 that results are rounded to), rows divided by the power of two next to their
largest number, which is exact and leaves room; sums are float32. Rows of float32 are PyTorch's to transform.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.tiles import is_turned, padded, processors, row_tiles
from starquant.kernels.tokens import Kronecker, Norm, TokenStates
from starquant.kernels.triton.rows import (
    clipped_scale_of,
    codes_from_zero,
    codes_of,
    ends_of,
    front_arguments,
    gated,
    grid_arguments,
    moved,
    normed,
    row_targets,
    scale_of,
    state_arguments,
    swiglu,
)

#: Warps a processor, in programs that each read A once: what its registers hold, in rows of up to 4,096.
WARPS, REGISTERS = 16, 65536


@triton.jit
def power_of_two(largest):
    """Return the power of two at or below a magnitude, and its reciprocal; those of 0 and of what is no number, too."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
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
    shared,
    d_m,
    factor,
    eps,
    qmax,
    reach,
    tiny,
    SYMMETRIC: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SWIGLU: tl.constexpr,
    NORM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    TILES: tl.constexpr,
):
    i, k, c = tl.arange(0, A), tl.arange(0, A), tl.arange(0, B)
    left = tl.load(left_ptr + k[None, :] * a + i[:, None], mask=(k < a)[None, :] & (i < a)[:, None], other=0.0)
    left = left.to(tl.float16)
    first, programs = tl.program_id(0), tl.num_programs(0)
    for turn in range(0, tl.cdiv(rows - first, programs)):
        row = first + turn * programs
        start = row.to(tl.int64) * width
        largest, squares = 0.0, 0.0
        xs = ()
        for n in tl.static_range(TILES):
            at = start + k[:, None] * stride_a + (n * B + c)[None, :] * stride_b
            inside = (k < a)[:, None] & (n * B + c < b)[None, :]
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
            if NORM:
                squares += tl.sum(x.to(tl.float32) * x.to(tl.float32))
            else:
                if SWIGLU:
                    x = swiglu(x, tl.load(front_ptr + at, mask=inside, other=0.0))
                x = x.to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(x)))
            xs += (x,)
        if NORM:
            new = ()
            for n in tl.static_range(TILES):
                at = k[:, None] * stride_a + (n * B + c)[None, :] * stride_b
                inside = (k < a)[:, None] & (n * B + c < b)[None, :]
                x = normed(xs[n], tl.load(front_ptr + at, mask=inside, other=0.0), squares, width, eps)
                largest = tl.maximum(largest, tl.max(tl.abs(x)))
                new += (x,)
            xs = new
        times, over = power_of_two(largest)
        ys = ()
        for n in tl.static_range(TILES):
            u = tl.dot(left, (xs[n] * over).to(tl.float16))
            if HAS_RIGHT:
                u = u.to(tl.float16)
                new = ()
                for m in tl.static_range(TILES):
                    inside = (n * B + c < b)[:, None] & (m * B + c < b)[None, :]
                    right = tl.load(right_ptr + (n * B + c)[:, None] * b + (m * B + c)[None, :], mask=inside, other=0.0)
                    right = right.to(tl.float16)
                    new += ((tl.dot(u, right) if n == 0 else tl.dot(u, right, ys[m])),)
                ys = new
            else:
                ys += (u,)
        state = tl.load(state_ptr + row) if HAS_GATE or HAS_CLIP else 0
        smallest, largest, strange = 0.0, 0.0, 0
        done = ()
        for m in tl.static_range(TILES):
            y = (ys[m] * factor * times).to(x_ptr.dtype.element_ty).to(tl.float32)
            if HAS_GATE:
                y = gated(y, i[:, None] * stride_a + (m * B + c)[None, :] * stride_b, state, shared, d_m)
            done += (y,)
            smallest, largest = tl.minimum(smallest, tl.min(y)), tl.maximum(largest, tl.max(y))
            strange += tl.sum((y != y).to(tl.int32))
        of_high = tl.load(clip_ptr + 2 * state) if HAS_CLIP else 1.0
        of_low = tl.load(clip_ptr + 2 * state + 1) if HAS_CLIP else 1.0
        if SYMMETRIC:
            if HAS_CLIP:
                scale = clipped_scale_of(smallest, largest, strange, of_low, of_high, reach, tiny)
            else:
                scale = scale_of(tl.maximum(largest, -smallest), strange, reach, tiny)
            zero = 0.0
        else:
            scale, zero = ends_of(smallest, largest, strange, of_low, of_high, reach, qmax, tiny)
            tl.store(zero_ptr + row, moved(zero, qmax))
        total = 0
        for m in tl.static_range(TILES):
            codes = codes_of(done[m], scale, qmax) if SYMMETRIC else codes_from_zero(done[m], scale, zero, qmax)
            inside = (i < a)[:, None] & (m * B + c < b)[None, :]
            at = codes_ptr + start + i[:, None] * stride_a + (m * B + c)[None, :] * stride_b
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
) -> tuple[Tensor, ...]:
    """Return transformed rows of 16 bits as `reference.quantize_rows` does; arguments as `quantize_rows`."""
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    codes, scale, *offsets = row_targets(x_MK, symmetric, sums)
    clip, state, gate, flags = state_arguments(states, width, scale)
    in_front, eps, kind = front_arguments(front, x_MK)
    left, right, a, b, *strides = sides(kronecker, width)
    shape = shape_of(a, b)
    programs = processors(x_MK.device) * WARPS // shape["num_warps"]
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
        *gate,
        kronecker.factor,
        eps,
        *grid_arguments(bits, clip_ratio, symmetric),
        SYMMETRIC=symmetric,
        SUMS=sums,
        HAS_RIGHT=right is not None,
        **flags,
        **kind,
        **shape,
    )
    return codes, scale, *offsets


def sides(kronecker: Kronecker, width: int) -> tuple[Tensor, Tensor | None, int, int, int, int]:
    """Return the factor on the left and on the right of a row, their sizes, and the strides of its tiles.

    A row [a, b] is multiplied as it lies, or as [b, a] where that pads its tiles less.
    """
    left, right = kronecker.a_MM, kronecker.b_NN
    a = len(left)
    b = width // a
    if right is not None and is_turned(a, b):
        return right, left, b, a, 1, b
    return left, right, a, b, b, 1


def shape_of(a: int, b: int) -> dict[str, int]:
    """Return the launch settings of a row [a, b]."""
    tile_a, tile_b, tiles = row_tiles(a, b)
    shape = {"A": tile_a, "B": tile_b, "TILES": tiles, "num_stages": 1}
    if padded(a, b) > 4096:
        return shape | {"num_warps": 8}
    return shape | {"num_warps": 4, "maxnreg": REGISTERS // (32 * WARPS)}
