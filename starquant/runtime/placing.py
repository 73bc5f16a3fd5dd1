"""Hand online transforms and static scales to an attention; the quantizers that come later keep them."""

from __future__ import annotations

from torch import Tensor, nn

from starquant.runtime.attention import FULL, QuantizedAttentionCore


def transform_queries_and_keys(attention: nn.Module, transform: nn.Module) -> None:
    """Make an attention transform its queries and keys after the rotary embedding."""
    attention.core = QuantizedAttentionCore(FULL, transform, getattr(attention.core, "v_scale_KE", None))


def scale_values(attention: nn.Module, scale_KE: Tensor) -> None:
    """Make an attention quantize V with static scales, once V is quantized."""
    attention.core = QuantizedAttentionCore(FULL, getattr(attention.core, "qk_transform", None), scale_KE)
