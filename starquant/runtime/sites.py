"""Quantized inputs of linears: one pass for all linears that share the input."""

from __future__ import annotations

from torch import Tensor, nn

from starquant.models.layers import InputSite
from starquant.numerics import QuantFormat, SqnrMeter, fake_quantize


class ActivationQuantizer(InputSite):
    """Transform the input of a group of linears, then quantize it per token, with a scale computed on the fly.

    Args:
        activation_format: the grid; 16 bits leave the values alone.
        transform: applied first; its inverse is folded into the weights that read the site.
    """

    def __init__(self, activation_format: QuantFormat, transform: nn.Module | None = None) -> None:
        super().__init__(transform)
        self.format = activation_format
        self.meter: SqnrMeter | None = None  # set while the loss is being measured

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the transformed input on its grid."""
        x_BLD = super().forward(x_BLD)
        quantized = fake_quantize(x_BLD, self.format)
        if self.meter is not None:
            self.meter.update(x_BLD, quantized)
        return quantized

    def extra_repr(self) -> str:
        """Show the format."""
        return f"{self.format.bits} bits"
