"""The integer path in plain PyTorch: what the kernels must equal, bit for bit in the accumulators."""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.kernels.packing import unpack
from starquant.kernels.tokens import NO_PROLOGUE, Prologue
from starquant.numerics import PerToken, QuantFormat, gate_channels
from starquant.numerics.rounding import grid_of


def weight_codes(codes: Tensor, bits: int) -> Tensor:
    """Return signed weight codes int8 [O, K] of stored ones: packed [O, J] up to 4 bits, [O, K] above."""
    if bits <= 4:
        codes = unpack(codes)
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def accumulate(x_MK: Tensor, w_OK: Tensor) -> Tensor:
    """Return int32 sums of products of int8 codes, [M, O]."""
    (rows, width), outputs = x_MK.shape, len(w_OK)
    if x_MK.is_cuda:  # the library's product wants at least 17 rows, and multiples of 8 everywhere
        x_MK = torch.nn.functional.pad(x_MK, (0, -width % 8, 0, max(32 - rows, -rows % 8)))
        w_OK = torch.nn.functional.pad(w_OK, (0, -width % 8, 0, -outputs % 8))
    sums: Tensor = torch._int_mm(x_MK, w_OK.T)
    return sums[:rows, :outputs]


def scaled(sums_MO: Tensor, x_scale_M1: Tensor, w_scale_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return sums times token scale times channel scale, plus bias, computed in float32."""
    y = sums_MO.float() * x_scale_M1 * w_scale_O
    return (y if bias_O is None else y + bias_O.float()).to(dtype)


def quantize_rows(
    x_MK: Tensor, bits: int, clip_ratio: float = 1.0, prologue: Prologue = NO_PROLOGUE
) -> tuple[Tensor, Tensor]:
    """Return (int8 codes, float32 scale [M, 1]) of rows, on `numerics.rounding`'s symmetric per-token grid."""
    qmax, width, states = (1 << (bits - 1)) - 1, x_MK.shape[-1], prologue.states
    for step in (prologue.affine, prologue.kronecker):
        if step is not None:
            x_MK = step.apply(x_MK).to(x_MK.dtype)
    x_MK = x_MK.float()
    if states is not None and states.d_m + states.d_u:
        keep_SK = gate_channels(width, states.d_m, states.d_u, x_MK.device)
        x_MK = x_MK.masked_fill(keep_SK[states.state] == 0, 0.0)  # not a product: what is no number is dropped too
    clip_ME = None
    if states is not None and states.clip_S is not None:
        clip_ME = states.clip_S[states.state].view(len(x_MK), -1)
    scale_M1, _ = grid_of(x_MK, QuantFormat(bits, True, PerToken(), clip_ratio), clip_ME)
    return torch.round(x_MK / scale_M1).clamp_(-qmax - 1, qmax).to(torch.int8), scale_M1
