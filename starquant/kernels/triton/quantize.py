"""Triton: what stands in front of a linear: TAC; SGAT's gate, clip ratio and per-token quantization in one pass.

TAC's maps are larger than a row: a tile of tokens shares what is read of them, which is a pass of its own, at a copy's
traffic. A program of the other pass takes a row: it is read, gated by its token's state, and written as int8 codes with
its grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.tokens import NO_PROLOGUE, Affine, Norm, Prologue
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
from starquant.kernels.triton.transform import power_of_two, transform_rows


@triton.jit
def _map_rows(
    x_ptr,
    matrix_ptr,
    shift_ptr,
    y_ptr,
    rows,
    width,
    span,
    EARLY: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maps of the runs among `span` channels as one product with a matrix that is 0 outside the runs."""
    start(EARLY)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    channel = tl.program_id(1) * span + k
    inside = (k < span) & (channel < width)
    at = row.to(tl.int64)[:, None] * width + channel[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    times, over = power_of_two(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    same_run = (k // GROUP)[:, None] == (k // GROUP)[None, :]
    matrix_at = matrix_ptr + (k % GROUP)[:, None] * width + channel[None, :]
    matrix = tl.load(matrix_at, mask=same_run & inside[:, None] & inside[None, :], other=0.0)
    y = tl.dot((x * over[:, None]).to(tl.float16), matrix.to(tl.float16)) * times[:, None]
    y += tl.load(shift_ptr + channel, mask=inside, other=0.0)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_rows(
    x_ptr,
    front_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    sum_ptr,
    clip_ptr,
    state_ptr,
    width,
    x_stride,
    front_stride,
    shared,
    d_m,
    eps,
    qmax,
    reach,
    tiny,
    FAST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SUMS: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SWIGLU: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start(EARLY)
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask = column < width
    long = row.to(tl.int64)  # many tokens of a wide layer pass 2^31
    state = tl.load(state_ptr + row) if HAS_GATE or CLIP > 0 else 0
    of_high = tl.load(clip_ptr + CLIP * state) if CLIP > 0 else 1.0
    of_low = tl.load(clip_ptr + CLIP * state + 1) if CLIP == 2 else of_high
    x = tl.load(x_ptr + long * x_stride + column, mask=mask, other=0.0)
    if SWIGLU:
        x = swiglu(x, tl.load(front_ptr + long * front_stride + column, mask=mask, other=0.0), FAST)
    elif NORM:
        gain = tl.load(front_ptr + column, mask=mask, other=0.0)
        x = normed(x, gain, tl.sum(x.to(tl.float32) * x.to(tl.float32)), width, eps)
    else:
        x = x.to(tl.float32)
    if HAS_GATE:
        x = gated(x, column, state, shared, d_m, width)
    if SYMMETRIC and CLIP < 2:
        scale = scale_of(largest_bits(x), of_high, reach, tiny)
        codes = codes_of(x, scale, qmax, FAST)
    else:
        smallest, largest, strange = tl.min(x), tl.max(x), tl.sum((x != x).to(tl.int32))
        if SYMMETRIC:
            scale = clipped_scale_of(smallest, largest, strange, of_low, of_high, reach, tiny)
            codes = codes_of(x, scale, qmax, FAST)
        else:
            scale, zero = ends_of(smallest, largest, strange, of_low, of_high, reach, qmax, tiny)
            codes = codes_from_zero(x, scale, zero, qmax, FAST)
            tl.store(zero_ptr + row, moved(zero, qmax))
    if SUMS:
        tl.store(sum_ptr + row, tl.sum(tl.where(mask, codes.to(tl.int32), 0)))
    tl.store(codes_ptr + long * width + column, codes, mask=mask)
    tl.store(scale_ptr + row, scale)


def map_rows(x_MK: Tensor, affine: Affine) -> Tensor:
    """Return TAC's map of every row, in the rows' dtype; as `Affine.apply`, float32 rows by it."""
    if x_MK.dtype == torch.float32:
        return affine.apply(x_MK)
    x_MK = x_MK.contiguous()
    (rows, width), size = x_MK.shape, affine.shift_NG.shape[1]
    y_MK = torch.empty_like(x_MK)
    block, tile = max(64, triton.next_power_of_2(size)), 16 if rows <= 256 else 64
    span = block // size * size
    matrix, shift = affine.columns_GK.contiguous(), affine.shift_NG.contiguous()
    grid = (triton.cdiv(rows, tile), triton.cdiv(width, span))
    sizes = {"GROUP": size, "ROWS": tile, "BLOCK": block}
    _map_rows[grid](x_MK, matrix, shift, y_MK, rows, width, span, **sizes, **early_arguments(x_MK))
    return y_MK


def quantize_rows(
    x_MK: Tensor,
    bits: int,
    clip_ratio: float = 1.0,
    prologue: Prologue = NO_PROLOGUE,
    symmetric: bool = True,
    sums: bool = False,
    front: Tensor | Norm | None = None,
) -> tuple[Tensor, ...]:
    """Return what `reference.quantize_rows` does.

    Args:
        x_MK: activations.
        bits: 2 to 8.
        clip_ratio: of the format.
        prologue: TAC, a Kronecker transform, gate and clip ratios with the state of every row [M].
        symmetric: whether the grid is.
        sums: whether codes are summed.
        front: SwiGLU's gate [M, K] or a norm, for rows of 16 bits without TAC; None for none.
    """
    states, kronecker = prologue.states, prologue.kronecker
    if prologue.affine is not None:
        x_MK = map_rows(x_MK, prologue.affine)
    if kronecker is not None and x_MK.dtype != torch.float32:
        return transform_rows(x_MK, bits, clip_ratio, kronecker, states, symmetric, sums, front)
    if kronecker is not None:
        x_MK = kronecker.apply(x_MK)
    x_MK = rows_of(x_MK)
    rows, width = x_MK.shape
    codes, scale, *offsets = row_targets(x_MK, symmetric, sums)
    clip, state, gate, flags = state_arguments(states, width, scale)
    in_front, front_stride, eps, kind = front_arguments(front, x_MK)
    _quantize_rows[(rows,)](
        x_MK,
        in_front,
        codes,
        scale,
        scale if symmetric else offsets[0],
        offsets[-1] if sums else scale,
        clip,
        state,
        width,
        x_MK.stride(0),
        front_stride,
        *gate,
        eps,
        *grid_arguments(bits, clip_ratio, symmetric),
        FAST=x_MK.is_cuda,
        SYMMETRIC=symmetric,
        SUMS=sums,
        BLOCK=triton.next_power_of_2(width),
        num_warps=16 if width > 8192 else 8 if width > 2048 else 4,
        **flags,
        **kind,
        **early_arguments(x_MK),
    )
    return codes, scale, *offsets
