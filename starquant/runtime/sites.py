"""Quantized inputs of linears: one pass for all linears that share the input."""

from __future__ import annotations

from torch import Tensor

from starquant.models.layers import InputSite
from starquant.numerics import QuantFormat, SqnrMeter, fake_quantize


class ActivationQuantizer(InputSite):
    """Quantize the input of a group of linears, per token, with a scale computed on the fly."""

    def __init__(self, activation_format: QuantFormat) -> None:
        super().__init__()
        self.format = activation_format
        self.meter: SqnrMeter | None = None  # set while the loss is being measured

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the input on its grid."""
        quantized = fake_quantize(x_BLD, self.format)
        if self.meter is not None:
            self.meter.update(x_BLD, quantized)
        return quantized

    def extra_repr(self) -> str:
        """Show the format."""
        return f"{self.format.bits} bits"
