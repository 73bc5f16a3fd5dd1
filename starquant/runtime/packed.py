"""Weights kept as integer codes, 4-bit ones two a byte.

A row's byte j holds code j in its low half and code j + in/2 in its high half, so that a kernel multiplies both
halves of a tile without interleaving. Codes are stored from 0; the grid's smallest code is added when they are read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.kernels import IntegerTokens, integer_linear, mixed_linear, uses_triton
from starquant.kernels.packing import pack, unpack
from starquant.numerics import PerChannel, PerGroup, QuantFormat, Quantized, dequantize
from starquant.runtime.keeping import Float32Buffers


class PackedLinear(Float32Buffers):
    """A linear whose weight is codes [O, I / 2] or [O, I], scales [O, groups], and zero points where asymmetric.

    It reads quantized values, as a fake-quantized linear does and with its numbers, or integer tokens (`kernels`).

    Args:
        in_features: inputs.
        out_features: outputs.
        weight_format: grid of the weight.
        bias: dtype of the bias, None for none.
    """

    def __init__(
        self, in_features: int, out_features: int, weight_format: QuantFormat, bias: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.weight_format = in_features, out_features, weight_format
        granularity = weight_format.granularity
        groups = in_features // granularity.size if isinstance(granularity, PerGroup) else 1
        columns = in_features // 2 if self.halved else in_features
        self.register_buffer("codes", torch.empty(out_features, columns, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(out_features, groups, dtype=torch.float32))
        self.zero: Tensor | None
        self.register_buffer("zero", None if weight_format.symmetric else torch.empty(out_features, groups))
        self.bias = None if bias is None else nn.Parameter(torch.empty(out_features, dtype=bias), requires_grad=False)

    @property
    def halved(self) -> bool:
        """Whether two codes share a byte."""
        return self.weight_format.bits <= 4

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantized: Quantized, weight_format: QuantFormat) -> PackedLinear:
        """Take the codes of a linear's weight, and its bias."""
        bias = None if linear.bias is None else linear.bias.dtype
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, weight_format, bias)
        codes = (quantized.codes - quantized.qmin).reshape(linear.weight.shape).to(torch.uint8)
        new.codes = pack(codes) if new.halved else codes
        new.scale = quantized.scale.reshape(linear.out_features, -1).float()
        new.zero = None if quantized.zero is None else quantized.zero.reshape(linear.out_features, -1).float()
        new.bias = linear.bias
        return new.train(linear.training)

    def quantized(self) -> Quantized:
        """Return the codes as they were solved."""
        codes = (unpack(self.codes) if self.halved else self.codes).to(torch.int16) + self.weight_format.qmin
        scale, zero = self.scale, self.zero
        shape = torch.Size((self.out_features, self.in_features))
        if isinstance(self.weight_format.granularity, PerGroup):
            codes = codes.unflatten(-1, (self.scale.shape[1], -1))
            scale, zero = scale[..., None], None if zero is None else zero[..., None]
        return Quantized(codes, scale, zero, shape, self.weight_format.qmin)

    def check(self, name: str) -> None:
        """Judge what was read.

        Raises:
            CheckpointError: codes that are not on the grid, scales that are not positive.
        """
        codes = unpack(self.codes) if self.halved else self.codes
        top = (1 << self.weight_format.bits) - 1
        if self.codes.dtype != torch.uint8 or int(codes.max()) > top:
            raise CheckpointError(
                f"{name}.codes: got {self.codes.dtype} up to {int(codes.max())}, allowed: uint8 up to {top}"
            )
        if not bool((self.scale > 0).all()) or not bool(torch.isfinite(self.scale).all()):
            raise CheckpointError(f"{name}.scale: got values that are not positive numbers")

    @property
    def takes_integers(self) -> bool:
        """Whether the integer path knows its grid: one scale a row, symmetric."""
        return self.weight_format.symmetric and isinstance(self.weight_format.granularity, PerChannel)

    def forward(self, x: Tensor | IntegerTokens) -> Tensor:
        """Return x W^T + b, [..., O]."""
        if isinstance(x, IntegerTokens):
            return integer_linear(x, self.codes, self.scale, self.weight_format.bits, self.bias)
        if self.takes_integers and x.dtype in (torch.float16, torch.bfloat16) and uses_triton(x):
            return mixed_linear(x, self.codes, self.scale, self.weight_format.bits, self.bias)
        return F.linear(x, dequantize(self.quantized(), x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Show shape and bits."""
        return f"{self.in_features}, {self.out_features}, {self.weight_format.bits} bits"
