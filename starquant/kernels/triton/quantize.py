"""Triton: what stands in front of a linear in one pass: TAC, SGAT's gate, clip ratio, per-token quantization.

A program takes a few rows: they are read, mapped by TAC's blocks, gated by their tokens' states, and written as int8
codes with the grid of each row. TAC's maps are larger than a row: several rows a program share what is read of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.tokens import NO_PROLOGUE, Affine, Prologue
from starquant.kernels.triton.rows import (
    clipped_scale_of,
    codes_from_zero,
    codes_of,
    ends_of,
    gated,
    grid_arguments,
    moved,
    row_targets,
    scale_of,
    state_arguments,
)
from starquant.kernels.triton.transform import transform_rows


@triton.jit
def _mapped(x_ptr, matrix_ptr, shift_ptr, start, column, mask, width, GROUP: tl.constexpr):
    """Channel k becomes the sum over j of M[k, j] x[first of its run + j], plus d[k]; rounded to x's dtype."""
    first = (column // GROUP) * GROUP
    total = tl.load(shift_ptr + column, mask=mask, other=0.0)
    for j in range(GROUP):
        weight = tl.load(matrix_ptr + j * width + column, mask=mask, other=0.0)
        total += weight * tl.load(x_ptr + start + first + j, mask=mask, other=0.0).to(tl.float32)
    return total.to(x_ptr.dtype.element_ty)


@triton.jit
def _map_rows(
    x_ptr, matrix_ptr, shift_ptr, y_ptr, rows, width, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    start, mask = row.to(tl.int64) * width, (row < rows) & (column < width)
    y = _mapped(x_ptr, matrix_ptr, shift_ptr, start, column, mask, width, GROUP)
    tl.store(y_ptr + start + column, y, mask=mask)


@triton.jit
def _quantize_rows(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    sum_ptr,
    clip_ptr,
    state_ptr,
    matrix_ptr,
    shift_ptr,
    rows,
    width,
    shared,
    d_m,
    qmax,
    reach,
    tiny,
    SYMMETRIC: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    here = row < rows
    mask = here[:, None] & (column < width)
    start = row.to(tl.int64)[:, None] * width  # many tokens of a wide layer pass 2^31
    if GROUP > 0:
        x = _mapped(x_ptr, matrix_ptr, shift_ptr, start, column, mask, width, GROUP).to(tl.float32)
    else:
        x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE or HAS_CLIP:
        state = tl.load(state_ptr + row, mask=here, other=0)
        if HAS_GATE:
            x = gated(x, column, state[:, None], shared, d_m)
    strange = tl.sum((x != x).to(tl.int32), 1)
    of_high = tl.load(clip_ptr + 2 * state) if HAS_CLIP else 1.0
    of_low = tl.load(clip_ptr + 2 * state + 1) if HAS_CLIP else 1.0
    if SYMMETRIC:
        if HAS_CLIP:
            scale = clipped_scale_of(tl.min(x, 1), tl.max(x, 1), strange, of_low, of_high, reach, tiny)
        else:
            scale = scale_of(tl.max(tl.abs(x), 1), strange, reach, tiny)
        codes = codes_of(x, scale[:, None], qmax)
    else:
        scale, zero = ends_of(tl.min(x, 1), tl.max(x, 1), strange, of_low, of_high, reach, qmax, tiny)
        codes = codes_from_zero(x, scale[:, None], zero[:, None], qmax)
        tl.store(zero_ptr + row, moved(zero, qmax), mask=here)
    if SUMS:
        tl.store(sum_ptr + row, tl.sum(tl.where(mask, codes.to(tl.int32), 0), 1), mask=here)
    tl.store(codes_ptr + start + column, codes, mask=mask)
    tl.store(scale_ptr + row, scale, mask=here)


def map_rows(x_MK: Tensor, affine: Affine) -> Tensor:
    """Return TAC's map of every row, in the rows' dtype; as `Affine.apply`."""
    x_MK = x_MK.contiguous()
    (rows, width), block = x_MK.shape, 512
    y_MK = torch.empty_like(x_MK)
    per = rows_a_program(rows, 8)
    grid = (triton.cdiv(rows, per), triton.cdiv(width, block))
    matrix, shift = affine.columns_GK.contiguous(), affine.shift_NG.contiguous()
    size = affine.shift_NG.shape[1]
    _map_rows[grid](x_MK, matrix, shift, y_MK, rows, width, GROUP=size, ROWS=per, BLOCK=block)
    return y_MK


def rows_a_program(rows: int, most: int) -> int:
    """Return how many rows share what a program reads of TAC: more where enough programs are left."""
    per = 1
    while per < most and rows >= 256 * per:
        per *= 2
    return per


def quantize_rows(
    x_MK: Tensor,
    bits: int,
    clip_ratio: float = 1.0,
    prologue: Prologue = NO_PROLOGUE,
    symmetric: bool = True,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """Return what `reference.quantize_rows` does.

    Args:
        x_MK: activations.
        bits: 2 to 8.
        clip_ratio: of the format.
        prologue: TAC, a Kronecker transform, gate and clip ratios with the state of every row [M].
        symmetric: whether the grid is.
        sums: whether codes are summed.
    """
    affine, states = prologue.affine, prologue.states
    if prologue.kronecker is not None:
        if affine is not None:
            x_MK = map_rows(x_MK, affine)
        return transform_rows(x_MK, bits, clip_ratio, prologue.kronecker, states, symmetric, sums)
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    codes, scale, *offsets = row_targets(x_MK, symmetric, sums)
    per = 1 if affine is None else rows_a_program(rows, 4)
    clip, state, gate, flags = state_arguments(states, width, scale)
    _quantize_rows[(triton.cdiv(rows, per),)](
        x_MK,
        codes,
        scale,
        scale if symmetric else offsets[0],
        offsets[-1] if sums else scale,
        clip,
        state,
        scale if affine is None else affine.columns_GK.contiguous(),
        scale if affine is None else affine.shift_NG.contiguous(),
        rows,
        width,
        *gate,
        *grid_arguments(bits, clip_ratio, symmetric),
        SYMMETRIC=symmetric,
        SUMS=sums,
        GROUP=0 if affine is None else affine.shift_NG.shape[1],
        ROWS=per,
        BLOCK=triton.next_power_of_2(width),
        num_warps=16 if width * per > 8192 else 8 if width * per > 2048 else 4,
        **flags,
    )
    return codes, scale, *offsets
