"""Hand online transforms and static scales to an attention; the quantizers that come later keep them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from starquant.quantized.attention import FULL, QuantizedAttentionCore


def transform_queries_and_keys(attention: nn.Module, transform: nn.Module) -> None:
    """Make an attention transform its queries and keys after the rotary embedding."""
    _replace(attention, qk_transform=transform)


def scale_values(attention: nn.Module, scale_KE: Tensor) -> None:
    """Make an attention quantize V with static scales, once V is quantized."""
    _replace(attention, v_scale_KE=scale_KE)


def transform_values(attention: nn.Module, transform: nn.Module) -> None:
    """Make an attention map its concatenated value heads, [B, L, K*E]."""
    _replace(attention, v_transform=transform)


def kept(core: nn.Module) -> dict[str, Any]:
    """Return what has been handed to an attention so far."""
    return {name: getattr(core, name, None) for name in ("qk_transform", "v_scale_KE", "v_transform")}


def _replace(attention: nn.Module, **new: Any) -> None:
    formats = getattr(attention.core, "formats", {})
    bits = {name: formats[name].bits for name in formats} or FULL
    attention.core = QuantizedAttentionCore(bits, **(kept(attention.core) | new))
