"""Transforms of activations that run online."""

from __future__ import annotations

from torch import Tensor, nn

from starquant.numerics import apply_hadamard
from starquant.runtime.rewriting import across_heads


class HeadsHadamard(nn.Module):
    """x (H (x) I): mix the channels of equal index of all heads; the output projection holds W (H (x) I)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed heads, [..., heads * E]."""
        return across_heads(x, self.heads)

    def __str__(self) -> str:
        return f"hadamard across {self.heads} heads"


class HadamardTransform(nn.Module):
    """x H of the last dimension; the linears behind it hold W H (QuaRot, arXiv 2404.00456)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Return x H, [..., width]."""
        return apply_hadamard(x)

    def extra_repr(self) -> str:
        """Show the width."""
        return str(self.width)

    def __str__(self) -> str:
        return f"hadamard {self.width}"
