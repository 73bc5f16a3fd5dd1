"""Triton: what every kernel that quantizes a row does with it; what launches take of grid and token states."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.tokens import Norm, TokenStates
from starquant.numerics import PerToken, QuantFormat

ROUND = tl.constexpr(1.5 * 2**23)
MASKED = tl.constexpr(0)  # on every axis of states


@triton.jit
def gated(x, channel, state, shared, d_m):
    """Zero the channels that a token's state does not use (`numerics.gate_channels`)."""
    masked_only = (channel >= shared) & (channel < shared + d_m)
    unmasked_only = channel >= shared + d_m
    return tl.where(((state == MASKED) & unmasked_only) | ((state != MASKED) & masked_only), 0.0, x)


@triton.jit
def swiglu(x, gate):
    """Multiply by silu(gate), rounded after each step as without kernels; float32."""
    of_gate = gate.to(tl.float32)
    of_gate = (of_gate / (1.0 + tl.exp(-of_gate))).to(x.dtype).to(tl.float32)
    return (x.to(tl.float32) * of_gate).to(x.dtype).to(tl.float32)


@triton.jit
def normed(x, gain, squares, width, eps):
    """Divide by the root of the mean square and multiply by a gain, rounded as without kernels; float32."""
    root = tl.rsqrt(tl.div_rn(squares, tl.cast(width, tl.float32)) + eps)
    y = (x.to(tl.float32) * root).to(x.dtype).to(tl.float32)
    return (y * gain.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def scale_of(largest, strange, reach, tiny):
    """Return a token's scale; `strange` counts what is no number, which maxima drop."""
    return tl.where(strange > 0, float("nan"), tl.maximum(largest * reach, tiny))


@triton.jit
def clipped_scale_of(smallest, largest, strange, of_low, of_high, reach, tiny):
    """Return a token's scale on a symmetric grid that covers the longer of its ends, each clipped at its own ratio."""
    longer = tl.maximum(largest * reach * of_high, -smallest * reach * of_low)
    return tl.where(strange > 0, float("nan"), tl.maximum(longer, tiny))


@triton.jit
def codes_of(x, scale, qmax):
    """Round to the nearest code, halves to even."""
    codes = tl.minimum(tl.maximum(tl.div_rn(x, scale), -qmax - 1.0), qmax)
    return ((codes + ROUND) - ROUND).to(tl.int8)


@triton.jit
def ends_of(smallest, largest, strange, of_low, of_high, reach, qmax, tiny):
    """Return a token's scale and zero point on an asymmetric grid, codes counted from 0.

    The ends of the range are cut at 0 after they are clipped: a product that is subtracted would be fused with that.
    """
    low, high = tl.minimum(smallest * reach * of_low, 0.0), tl.maximum(largest * reach * of_high, 0.0)
    scale = tl.maximum(tl.div_rn(high - low, qmax), tiny)
    zero = (tl.div_rn(-low, scale) + ROUND) - ROUND
    return tl.where(strange > 0, float("nan"), scale), zero


@triton.jit
def moved(codes, qmax):
    """Return codes or zero points of an asymmetric grid, int32, moved to where signed ones are (`kernels.offsets`)."""
    return (codes - (qmax + 1.0) * 0.5).to(tl.int32)


@triton.jit
def codes_from_zero(x, scale, zero, qmax):
    """Round to the nearest code, halves to even, on a grid of a zero point; clamped first, so that ROUND holds it."""
    codes = tl.minimum(tl.maximum(tl.div_rn(x, scale), -zero), qmax - zero)
    return moved(((codes + ROUND) - ROUND) + zero, qmax).to(tl.int8)


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


def front_arguments(front: Tensor | Norm | None, unused: Tensor) -> tuple[Tensor, float, dict[str, bool]]:
    """Return what kernels take of what stands in front: SwiGLU's gate or a norm's gain, its eps, and which it is."""
    flags = {"SWIGLU": isinstance(front, Tensor), "NORM": isinstance(front, Norm)}
    if isinstance(front, Norm):
        return front.gain_K.contiguous(), front.eps, flags
    return unused if front is None else front.contiguous(), 0.0, flags


def grid_arguments(bits: int, clip_ratio: float, symmetric: bool) -> tuple[float, float, float]:
    """Return what kernels take of the grid: its largest code, a factor, the least scale.

    The largest magnitude times the factor is a symmetric grid's scale; on an asymmetric one it clips both ends.
    """
    qmax = QuantFormat(bits, symmetric, PerToken()).qmax
    return float(qmax), clip_ratio / qmax if symmetric else clip_ratio, torch.finfo(torch.float32).tiny


def row_targets(x_MK: Tensor, symmetric: bool, sums: bool) -> list[Tensor]:
    """Return memory for what `reference.quantize_rows` returns."""
    kinds = [torch.float32] + [torch.int32] * (int(not symmetric) + int(sums))
    per_token = [torch.empty(len(x_MK), 1, dtype=kind, device=x_MK.device) for kind in kinds]
    return [torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device), *per_token]
