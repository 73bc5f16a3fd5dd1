"""A linear whose weight lies on a quantization grid; its input is quantized once, at the site it shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from starquant.numerics import QuantFormat, Quantized, dequantize, fake_quantize
from starquant.numerics.chunks import row_slices


class FakeQuantLinear(nn.Linear):
    """`nn.Linear` with a weight that has been rounded to `weight_format`.

    The arithmetic stays in floating point ("fake" quantization): the numbers are those of the integer
    product, the speed and memory are not.
    """

    weight_format: QuantFormat

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantized: Quantized, weight_format: QuantFormat) -> FakeQuantLinear:
        """Take over `linear`'s parameters and write the quantized weight [out, in] into its storage."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        with torch.no_grad():
            for rows in row_slices(linear.weight):
                linear.weight[rows] = dequantize(quantized.of_rows(rows), linear.weight.dtype)
        new.weight, new.bias = linear.weight, linear.bias
        new.weight_format = weight_format
        return new.train(linear.training)

    def extra_repr(self) -> str:
        """Show the weight's format."""
        return f"{super().extra_repr()}, weight={self.weight_format.bits} bits"


class BlockInputLinear(nn.Linear):
    """A head whose input is quantized, as llama.cpp's product with a quantized weight has it; the weight is its own."""

    input_format: QuantFormat

    @classmethod
    def from_linear(cls, linear: nn.Linear, input_format: QuantFormat) -> BlockInputLinear:
        """Take over a linear's parameters, which may be another module's as well."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        new.input_format = input_format
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return Q(x) W^T + b."""
        return super().forward(fake_quantize(input, self.input_format))
