"""Triton: an online transform x (A (x) B) of a row, its gate and its per-token quantization in one pass.

Hadamard transforms (A and B of signs) and learned Kronecker P alike. A program holds one row as a tile [a, b],
multiplies it from both sides on tensor cores, and writes int8 codes and the row's grid; nothing between goes through
memory. Rows of 16 bits are multiplied in TF32 (11 bits, against the 8 of bfloat16 that results are rounded to),
others in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.tokens import Kronecker, TokenStates
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


@triton.jit
def _transform_rows(
    x_ptr,
    a_ptr,
    b_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    sum_ptr,
    clip_ptr,
    state_ptr,
    a,
    b,
    shared,
    d_m,
    factor,
    qmax,
    reach,
    tiny,
    SYMMETRIC: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEP_A: tl.constexpr,
    STEP_B: tl.constexpr,
):
    row = tl.program_id(0)
    i, c = tl.arange(0, A), tl.arange(0, B)
    x_at = x_ptr + row.to(tl.int64) * (a * b)
    y = tl.zeros((A, B), dtype=tl.float32)
    for first in range(0, a, STEP_A):  # y[i, c] += A[k, i] (x B)[k, c]
        k = first + tl.arange(0, STEP_A)
        if HAS_B:
            t = tl.zeros((STEP_A, B), dtype=tl.float32)
            for start in range(0, b, STEP_B):
                n = start + tl.arange(0, STEP_B)
                x = tl.load(x_at + k[:, None] * b + n[None, :], mask=(k < a)[:, None] & (n < b)[None, :], other=0.0)
                right = tl.load(
                    b_ptr + n[:, None] * b + c[None, :], mask=(n < b)[:, None] & (c < b)[None, :], other=0.0
                )
                t = tl.dot(x.to(tl.float32), right, t, input_precision=PRECISION)
        else:
            t = tl.load(x_at + k[:, None] * b + c[None, :], mask=(k < a)[:, None] & (c < b)[None, :], other=0.0)
            t = t.to(tl.float32)
        left = tl.load(a_ptr + k[None, :] * a + i[:, None], mask=(k < a)[None, :] & (i < a)[:, None], other=0.0)
        y = tl.dot(left, t, y, input_precision=PRECISION)
    y = (y * factor).to(x_ptr.dtype.element_ty).to(tl.float32)
    channel, inside = i[:, None] * b + c[None, :], (i < a)[:, None] & (c < b)[None, :]
    if HAS_GATE or HAS_CLIP:
        state = tl.load(state_ptr + row)
        if HAS_GATE:
            y = gated(y, channel, state, shared, d_m)
    strange = tl.sum((y != y).to(tl.int32))
    of_high = tl.load(clip_ptr + 2 * state) if HAS_CLIP else 1.0
    of_low = tl.load(clip_ptr + 2 * state + 1) if HAS_CLIP else 1.0
    if SYMMETRIC:
        if HAS_CLIP:
            scale = clipped_scale_of(tl.min(y), tl.max(y), strange, of_low, of_high, reach, tiny)
        else:
            scale = scale_of(tl.max(tl.abs(y)), strange, reach, tiny)
        codes = codes_of(y, scale, qmax)
    else:
        scale, zero = ends_of(tl.min(y), tl.max(y), strange, of_low, of_high, reach, qmax, tiny)
        codes = codes_from_zero(y, scale, zero, qmax)
        tl.store(zero_ptr + row, moved(zero, qmax))
    if SUMS:
        tl.store(sum_ptr + row, tl.sum(tl.where(inside, codes.to(tl.int32), 0)))
    tl.store(codes_ptr + row.to(tl.int64) * (a * b) + channel, codes, mask=inside)
    tl.store(scale_ptr + row, scale)


def transform_rows(
    x_MK: Tensor,
    bits: int,
    clip_ratio: float,
    kronecker: Kronecker,
    states: TokenStates | None,
    symmetric: bool = True,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """Return transformed rows as `reference.quantize_rows` does; arguments as `quantize_rows`."""
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    codes, scale, *offsets = row_targets(x_MK, symmetric, sums)
    a = len(kronecker.a_MM)
    clip, state, gate, flags = state_arguments(states, width, scale)
    _transform_rows[(rows,)](
        x_MK,
        kronecker.a_MM.contiguous(),
        scale if kronecker.b_NN is None else kronecker.b_NN.contiguous(),
        codes,
        scale,
        scale if symmetric else offsets[0],
        offsets[-1] if sums else scale,
        clip,
        state,
        a,
        width // a,
        *gate,
        kronecker.factor,
        *grid_arguments(bits, clip_ratio, symmetric),
        SYMMETRIC=symmetric,
        SUMS=sums,
        HAS_B=kronecker.b_NN is not None,
        PRECISION="ieee" if x_MK.dtype == torch.float32 else "tf32",
        **flags,
        **shape_of(a, width // a),
    )
    return codes, scale, *offsets


def shape_of(a: int, b: int) -> dict[str, int]:
    """Return the launch settings of a row [a, b]: its tile in registers, the factors in steps through shared memory."""
    tile_a, tile_b = (max(16, triton.next_power_of_2(n)) for n in (a, b))
    size = tile_a * tile_b
    warps = 4 if size <= 4096 else 8 if size <= 16384 else 16
    step_a, step_b = min(tile_a, 64 if size <= 4096 else 32), min(tile_b, 64 if size <= 16384 else 32)
    return {"A": tile_a, "B": tile_b, "STEP_A": step_a, "STEP_B": step_b, "num_warps": warps, "num_stages": 2}
