"""Attention whose operands Q, K, P = softmax(QK^T / sqrt(E)) and V each have their own bits.

Q, K and V have one scale a token and head; P has one a query and head, on an unsigned grid (it is never negative).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from starquant.models.layers import AttentionCore
from starquant.numerics import PerToken, QuantFormat, SqnrMeter, fake_quantize

OPERANDS = ("q", "k", "p", "v")


def operand_format(operand: str, bits: int) -> QuantFormat:
    """Return the grid of one operand: symmetric for q, k, v; unsigned for the probabilities p."""
    return QuantFormat(bits, symmetric=operand != "p", granularity=PerToken())


class QuantizedAttentionCore(AttentionCore):
    """Scaled dot-product attention on quantized operands.

    Args:
        bits: bits of "q", "k", "p", "v"; 16 leaves an operand alone.
    """

    def __init__(self, bits: dict[str, int]) -> None:
        super().__init__()
        self.formats = {name: operand_format(name, bits[name]) for name in OPERANDS}
        self.meters: dict[str, SqnrMeter] | None = None

    def forward(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, H, L, E], as `AttentionCore`."""
        q, k, v = self._quantize("q", q_BHLE), self._quantize("k", k_BKLE), self._quantize("v", v_BKLE)
        if not self.formats["p"].quantizes:
            return super().forward(q, k, v, mask)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores_BHLL = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        if mask is not None:
            scores_BHLL = scores_BHLL.masked_fill(~mask, -torch.inf)
        p_BHLL = self._quantize("p", scores_BHLL.softmax(-1))
        return p_BHLL.to(v.dtype) @ v

    def _quantize(self, name: str, x: Tensor) -> Tensor:
        quantized = fake_quantize(x, self.formats[name])
        if self.meters is not None and self.formats[name].quantizes:
            self.meters[name].update(x, quantized)
        return quantized

    def extra_repr(self) -> str:
        """Show the bits."""
        return ", ".join(f"{name}={fmt.bits}" for name, fmt in self.formats.items())
