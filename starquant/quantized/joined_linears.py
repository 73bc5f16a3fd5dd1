"""Linears that read one site, multiplied as one: q, k and v; gate and up. The same integers, fewer, larger products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from starquant.kernels import IntegerTokens, integer_linear
from starquant.quantized.packed_linear import PackedLinear


class JoinedLinears:
    """Weights of several packed linears, one below the other in one memory; the linears keep views of it.

    The site that the linears read owns it, multiplies with it, and moves it. A linear's `place` is that of its product.

    Args:
        linears: of one number of bits, all with a bias or none, all with offsets or none, with their weights loaded.
    """

    @torch.no_grad()
    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        self.linears, self.sizes = tuple(linears), [linear.out_features for linear in linears]
        self.bits = linears[0].weight_format.bits
        with torch.inference_mode(False):
            self.codes = torch.cat([linear.codes for linear in linears])
            self.scale = torch.cat([linear.scale for linear in linears])
            biases = [linear.bias.data for linear in linears if linear.bias is not None]
            self.bias = torch.cat(biases) if biases else None
            offsets = [linear.offsets for linear in linears if linear.offsets is not None]
            self.offsets = torch.cat(offsets) if offsets else None
        for place, linear in enumerate(linears):
            linear.place = place
        self._share()

    @classmethod
    def of(cls, linears: Sequence[PackedLinear]) -> JoinedLinears | None:
        """Return linears joined; None where they are of several kinds, or one alone."""
        kinds = {(linear.weight_format.bits, linear.bias is None) for linear in linears}
        return cls(linears) if len(linears) > 1 and len(kinds) == 1 else None

    def multiply(self, x: IntegerTokens) -> IntegerTokens:
        """Return the tokens with the product of every linear."""
        y = integer_linear(x, self.codes, self.scale, self.bits, self.bias, self.offsets)
        return replace(x, products=tuple(y.split(self.sizes, -1)))

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow a model that is moved or cast (`nn.Module._apply`), the linears' views with it."""
        with torch.inference_mode(False):
            self.codes, self.scale = change(self.codes), self.scale.to(change(self.scale).device)
            self.bias = None if self.bias is None else change(self.bias)
            self.offsets = None if self.offsets is None else change(self.offsets)
        self._share()

    def _share(self) -> None:
        parts = zip(self.linears, self.codes.split(self.sizes), self.scale.split(self.sizes), strict=True)
        for linear, codes, scale in parts:
            linear.codes, linear.scale = codes, scale
        if self.offsets is not None:
            for linear, offsets in zip(self.linears, self.offsets.split(self.sizes), strict=True):
                linear.offsets = offsets
