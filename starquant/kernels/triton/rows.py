"""Triton: what every kernel that quantizes a row does with it; what launches take of grid and token states."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.tokens import TokenStates
from starquant.numerics import TokenState

ROUND = tl.constexpr(1.5 * 2**23)
MASKED = tl.constexpr(TokenState.MASKED.axis)


@triton.jit
def gated(x, channel, state, shared, d_m):
    """Zero the channels that a token's state does not use (`numerics.gate_channels`)."""
    masked_only = (channel >= shared) & (channel < shared + d_m)
    unmasked_only = channel >= shared + d_m
    return tl.where(((state == MASKED) & unmasked_only) | ((state != MASKED) & masked_only), 0.0, x)


@triton.jit
def scale_of(largest, strange, per_code, tiny):
    """Return a token's scale; `strange` counts what is no number, which maxima drop."""
    return tl.where(strange > 0, float("nan"), tl.maximum(largest * per_code, tiny))


@triton.jit
def clipped_scale_of(high, low, strange, clip_ptr, state, per_code, tiny):
    """Return a token's scale by its largest and smallest number, each with the clip ratio of its state and end."""
    of_high, of_low = tl.load(clip_ptr + 2 * state), tl.load(clip_ptr + 2 * state + 1)
    reach = tl.maximum(high * per_code * of_high, -low * per_code * of_low)
    return tl.where(strange > 0, float("nan"), tl.maximum(reach, tiny))


@triton.jit
def codes_of(x, scale, qmax):
    """Round to the nearest code, halves to even."""
    codes = tl.minimum(tl.maximum(tl.div_rn(x, scale), -qmax - 1.0), qmax)
    return ((codes + ROUND) - ROUND).to(tl.int8)


def state_arguments(
    states: TokenStates | None, width: int, unused: Tensor
) -> tuple[Tensor, Tensor, tuple[int, int], dict[str, bool]]:
    """Return what kernels take of token states: clip ratios, states, (shared, d_m), and which of them there are.

    `unused` is passed where there is no tensor.
    """
    if states is None:
        return unused, unused, (width, 0), {"HAS_CLIP": False, "HAS_GATE": False}
    clip = states.clip_S
    flags = {"HAS_CLIP": clip is not None, "HAS_GATE": states.d_m + states.d_u > 0}
    channels = width - states.d_m - states.d_u, states.d_m
    if clip is not None:
        clip = clip.view(len(clip), -1).expand(-1, 2).contiguous()  # one ratio is that of both ends
    return unused if clip is None else clip, states.state.contiguous(), channels, flags


def grid_arguments(bits: int, clip_ratio: float) -> tuple[float, float, float]:
    """Return what kernels take of the grid: its largest code, the scale of the largest magnitude, the least scale."""
    qmax = (1 << (bits - 1)) - 1
    return float(qmax), clip_ratio / qmax, torch.finfo(torch.float32).tiny
