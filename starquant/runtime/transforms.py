"""Transforms of activations that run online."""

from __future__ import annotations

from torch import Tensor, nn

from starquant.numerics import apply_hadamard


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
