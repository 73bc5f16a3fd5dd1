"""The integer path in plain PyTorch: what the kernels must equal, bit for bit in the accumulators."""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.kernels.packing import unpack
from starquant.kernels.tokens import NO_PROLOGUE, Prologue
from starquant.numerics import PerToken, QuantFormat, gate_channels
from starquant.numerics.rounding import grid_of, round_to_grid
from starquant.numerics.token_states import group_indices


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
    x_MK: Tensor,
    bits: int,
    clip_ratio: float = 1.0,
    prologue: Prologue = NO_PROLOGUE,
    symmetric: bool = True,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """Return rows on `numerics.rounding`'s per-token grid.

    Args:
        x_MK: activations.
        bits: 2 to 8.
        clip_ratio: of the format.
        prologue: what runs in front.
        symmetric: whether the grid is; else its codes and zero points are moved by 2^(b-1) (`kernels.offsets`).
        sums: whether a weight that reads the codes is asymmetric.

    Returns:
        Codes int8 [M, K] and scale float32 [M, 1]; the zero point int32 [M, 1] where the grid is asymmetric; the sum of
        the codes int32 [M, 1] with `sums`.
    """
    fmt, width, states = QuantFormat(bits, symmetric, PerToken(), clip_ratio), x_MK.shape[-1], prologue.states
    for step in (prologue.affine, prologue.kronecker):
        if step is not None:
            x_MK = step.apply(x_MK).to(x_MK.dtype)
    x_MK = x_MK.float()
    if states is not None and states.d_m + states.d_u:
        keep_GK = gate_channels(width, states.d_m, states.d_u, x_MK.device)
        closed_MK = keep_GK[group_indices(states.state)] == 0
        x_MK = x_MK.masked_fill(closed_MK, 0.0)  # not a product: what is no number is dropped too
    clip_ME = None
    if states is not None and states.clip_S is not None:
        clip_ME = states.clip_S[states.state].view(len(x_MK), -1)
    scale_M1, zero_M1 = grid_of(x_MK, fmt, clip_ME)
    codes_MK, middle = round_to_grid(x_MK, scale_M1, zero_M1, fmt), 1 << (bits - 1)
    if zero_M1 is not None:
        codes_MK -= middle
    parts = [codes_MK.to(torch.int8), scale_M1]
    if zero_M1 is not None:
        parts.append(zero_M1.int() - middle)
    if sums:
        parts.append(parts[0].sum(-1, keepdim=True, dtype=torch.int32))
    return tuple(parts)
