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
INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def gated(x, channel, state, shared, d_m, width):
    """Zero the channels that a token's state does not use, which lie side by side (`numerics.gate_channels`)."""
    first = tl.where(state == MASKED, shared + d_m, shared)
    end = tl.where(state == MASKED, width, shared + d_m)
    return tl.where((channel >= first) & (channel < end), 0.0, x)


#: x / (1 + exp(-x)), without what exponential and division do for numbers near 0: 5 instructions.
SILU = tl.constexpr(
    """{
    .reg .f32 t;
    mul.f32 t, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 t, t;
    add.f32 t, t, 0f3F800000;
    rcp.approx.ftz.f32 t, t;
    mul.f32 $0, $1, t;
    }"""
)


@triton.jit
def swiglu(x, gate, FAST: tl.constexpr):
    """Multiply by silu(gate), rounded after each step as without kernels; float32."""
    of_gate = gate.to(tl.float32)
    if FAST:
        of_gate = tl.inline_asm_elementwise(SILU, "=f,f", [of_gate], tl.float32, is_pure=True, pack=1)
    else:
        of_gate = of_gate / (1.0 + tl.exp(-of_gate))
    of_gate = of_gate.to(x.dtype).to(tl.float32)
    return (x.to(tl.float32) * of_gate).to(x.dtype).to(tl.float32)


@triton.jit
def normed(x, gain, squares, width, eps):
    """Divide by the root of the mean square and multiply by a gain, rounded as without kernels; float32."""
    root = tl.rsqrt(tl.div_rn(squares, tl.cast(width, tl.float32)) + eps)
    y = (x.to(tl.float32) * root).to(x.dtype).to(tl.float32)
    return (y * gain.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def largest_bits(x):
    """Return the bits of the largest magnitude, as an integer: those of what is no number are larger than any."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def scale_of(bits, of_both, reach, tiny):
    """Return a token's scale on a symmetric grid, of the bits of its largest magnitude; no number if that is none."""
    largest = bits.to(tl.float32, bitcast=True)
    return tl.where(bits > INFINITE, float("nan"), tl.maximum(largest * reach * of_both, tiny))


@triton.jit
def clipped_scale_of(smallest, largest, strange, of_low, of_high, reach, tiny):
    """Return a token's scale on a symmetric grid that covers the longer of its ends, each clipped at its own ratio.

    `strange` counts what is no number, which maxima drop.
    """
    longer = tl.maximum(largest * reach * of_high, -smallest * reach * of_low)
    return tl.where(strange > 0, float("nan"), tl.maximum(longer, tiny))


@triton.jit
def quotient(x, scale, FAST: tl.constexpr):
    """Divide a row by its scale. FAST: by the rounded reciprocal, corrected once, which rounds as a division does."""
    if FAST:
        over = tl.div_rn(1.0, scale)
        near = x * over
        return tl.fma(tl.fma(-near, scale, x), over, near)
    else:
        return tl.div_rn(x, scale)


@triton.jit
def codes_of(x, scale, qmax, FAST: tl.constexpr):
    """Round to the nearest code, halves to even: ROUND leaves it in the last byte."""
    codes = tl.minimum(tl.maximum(quotient(x, scale, FAST), -qmax - 1.0), qmax)
    return (codes + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


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
def codes_from_zero(x, scale, zero, qmax, FAST: tl.constexpr):
    """Round to the nearest code, halves to even, on a grid of a zero point; clamped first, so that ROUND holds it."""
    codes = tl.minimum(tl.maximum(quotient(x, scale, FAST), -zero), qmax - zero)
    return moved(((codes + ROUND) - ROUND) + zero, qmax).to(tl.int8)


def state_arguments(
    states: TokenStates | None, width: int, unused: Tensor
) -> tuple[Tensor, Tensor, tuple[int, int], dict[str, int]]:
    """Return what kernels take of token states: clip ratios, states, (shared, d_m), and which of them there are.

    CLIP counts a state's ratios: none, one, or one of each end. `unused` is passed where there is no tensor.
    """
    if states is None:
        return unused, unused, (width, 0), {"CLIP": 0, "HAS_GATE": False}
    clip = states.clip_S
    flags = {"CLIP": 0 if clip is None else clip.numel() // len(clip), "HAS_GATE": states.d_m + states.d_u > 0}
    channels = width - states.d_m - states.d_u, states.d_m
    return unused if clip is None else clip.contiguous(), states.state.contiguous(), channels, flags


def rows_of(x_MK: Tensor) -> Tensor:
    """Return rows whose numbers lie side by side; they may be apart, as those of a part of a joined product."""
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def front_arguments(front: Tensor | Norm | None, unused: Tensor) -> tuple[Tensor, int, float, dict[str, bool]]:
    """Return what kernels take of what stands in front: SwiGLU's gate and from row to row of it how far it is, or a
    norm's gain and eps; and which it is.
    """
    flags = {"SWIGLU": isinstance(front, Tensor), "NORM": isinstance(front, Norm)}
    if isinstance(front, Norm):
        return front.gain_K.contiguous(), 0, front.eps, flags
    gate_MK = unused if front is None else rows_of(front)
    return gate_MK, gate_MK.stride(0), 0.0, flags


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
