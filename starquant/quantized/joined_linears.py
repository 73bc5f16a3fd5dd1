"""Linears that read one site, multiplied as one: q, k and v; gate and up. The same integers, fewer, larger products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starquant.kernels import IntegerTokens, integer_linear
from starquant.quantized.packed_linear import PackedLinear


class Joined:
    """Weights of several packed linears, one below the other in one memory; the linears keep views of it.

    Args:
        linears: of one site and one number of bits, all with a bias or none.
    """

    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        self.linears, self.sizes = tuple(linears), [linear.out_features for linear in linears]
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None
        self.bias: Tensor | None = None

    @classmethod
    def of(cls, linears: Sequence[PackedLinear]) -> Joined | None:
        """Return linears joined; None where they are of several kinds, or one alone."""
        kinds = {(linear.weight_format.bits, linear.bias is None) for linear in linears}
        return cls(linears) if len(linears) > 1 and len(kinds) == 1 else None

    def product(self, x: IntegerTokens, linear: PackedLinear) -> Tensor:
        """Return a linear's product [..., O]; the first that asks computes those of all."""
        if not x.products:
            moved = self.codes is None or self.codes.device != linear.codes.device
            if moved or (self.bias is not None and linear.bias is not None and self.bias.dtype != linear.bias.dtype):
                torch.compiler.disable(self._join)()
            assert self.codes is not None and self.scale is not None
            y = integer_linear(x, self.codes, self.scale, linear.weight_format.bits, self.bias)
            x.products.extend(y.split(self.sizes, -1))
        return x.products[next(i for i, own in enumerate(self.linears) if own is linear)]

    @torch.no_grad()
    def _join(self) -> None:
        """Bring the weights together, where the model is now."""
        with torch.inference_mode(False):
            self.codes = torch.cat([linear.codes for linear in self.linears])
            self.scale = torch.cat([linear.scale for linear in self.linears])
            biases = [linear.bias for linear in self.linears if linear.bias is not None]
            self.bias = torch.cat([bias.data for bias in biases]) if biases else None
            for linear, codes in zip(self.linears, self.codes.split(self.sizes), strict=True):
                linear.codes = codes
