"""Triton: what stands in front of a linear in one pass: TAC, SGAT's gate, clip ratio, per-token quantization.

A program takes one row: it is read, mapped by TAC's blocks, gated by its token's state, and written as int8 codes with
one scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.tokens import NOTHING, Before

ROUND = tl.constexpr(1.5 * 2**23)


@triton.jit
def _quantize_rows(
    x_ptr,
    codes_ptr,
    scale_ptr,
    clip_ptr,
    state_ptr,
    matrix_ptr,
    shift_ptr,
    width,
    shared,
    masked,
    qmax,
    per_code,
    tiny,
    HAS_CLIP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    start = row.to(tl.int64) * width  # many tokens of a wide layer pass 2^31
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    if GROUP > 0:  # channel k becomes sum over j of M[k, j] x[first of its run + j], plus d[k]
        first = (column // GROUP) * GROUP
        mapped = tl.load(shift_ptr + column, mask=inside, other=0.0)
        for j in range(GROUP):
            weight = tl.load(matrix_ptr + column * GROUP + j, mask=inside, other=0.0)
            mapped += weight * tl.load(x_ptr + start + first + j, mask=inside, other=0.0).to(tl.float32)
        x = mapped.to(x_ptr.dtype.element_ty).to(tl.float32)
    if HAS_GATE:  # channels are [shared | masked only | other only]
        is_masked = tl.load(state_ptr + row) != 0
        of_masked = (column >= shared) & (column < shared + masked)
        of_others = column >= shared + masked
        x = tl.where((is_masked & of_others) | ((is_masked == 0) & of_masked), 0.0, x)
    scale = tl.max(tl.abs(x), 0) * per_code
    if HAS_CLIP:
        scale = scale * tl.load(clip_ptr + row)
    scale = tl.maximum(scale, tiny)
    scale = tl.where(tl.sum((x != x).to(tl.int32), 0) > 0, float("nan"), scale)  # maxima drop what is no number
    codes = tl.minimum(tl.maximum(tl.div_rn(x, scale), -qmax - 1.0), qmax)
    codes = (codes + ROUND) - ROUND  # to the nearest integer, halves to even
    tl.store(codes_ptr + start + column, codes.to(tl.int8), mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows(
    x_MK: Tensor,
    bits: int,
    clip_M1: Tensor | None = None,
    clip_ratio: float = 1.0,
    before: Before = NOTHING,
) -> tuple[Tensor, Tensor]:
    """Return (int8 codes [M, K], float32 scale [M, 1]), as `reference.quantize_rows`.

    Args:
        x_MK: activations.
        bits: 2 to 8.
        clip_M1: ratios that multiply `clip_ratio`, None for none.
        clip_ratio: of the format.
        before: TAC, and a gate with the state of every row [M].
    """
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=x_MK.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x_MK.device)
    qmax = (1 << (bits - 1)) - 1
    gate, affine = before.gate, before.affine
    masked, unmasked = (0, 0) if gate is None else (gate.d_m, gate.d_u)
    _quantize_rows[(rows,)](
        x_MK,
        codes,
        scale,
        clip_M1.contiguous() if clip_M1 is not None else scale,
        scale if gate is None else gate.masked.to(torch.int8).contiguous(),
        scale if affine is None else affine.matrix_NGG.contiguous(),
        scale if affine is None else affine.shift_NG.contiguous(),
        width,
        width - masked - unmasked,
        masked,
        float(qmax),
        clip_ratio / qmax,
        torch.finfo(torch.float32).tiny,
        HAS_CLIP=clip_M1 is not None,
        HAS_GATE=gate is not None,
        GROUP=0 if affine is None else affine.shift_NG.shape[1],
        BLOCK=triton.next_power_of_2(width),
        num_warps=16 if width > 8192 else 8 if width > 2048 else 4,
    )
    return codes, scale
