"""Quantized inputs of linears: one pass for all linears that share the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.kernels import IntegerTokens, quantize_tokens
from starquant.models.context import Context
from starquant.models.layers import Front, InputSite
from starquant.numerics import QuantFormat, SqnrMeter, fake_quantize
from starquant.quantized.joined_linears import JoinedLinears
from starquant.quantized.packed_linear import PackedLinear
from starquant.quantized.site_prologue import SitePrologue

#: Where a site hands integers to its linears, and where it multiplies them as one.
Where = Literal["never", "on_gpu", "always"]


class ActivationQuantizer(InputSite):
    """Transform the input of a group of linears, then quantize it per token, with a scale computed on the fly.

    What its integer path needs beside the transform's tensors is made by `use_integers`, and again when the module is
    moved to another device.

    Args:
        activation_format: the grid; 16 bits leave the values alone.
        transform: applied first; its inverse is folded into the weights that read the site.
        state_clip: clip ratios of each token state, on top of the format's: [S], or [S, 2] with one of the largest
            number and one of the smallest.

    Attributes:
        integers: where integers are handed over.
        prologue: what runs in front of quantization where they are; None elsewhere.
        joined: the linears that read the site, multiplied here as one; None where each multiplies by itself.
    """

    def __init__(
        self, activation_format: QuantFormat, transform: nn.Module | None = None, state_clip: Tensor | None = None
    ) -> None:
        super().__init__(transform, state_clip)
        self.format = activation_format
        self.meter: SqnrMeter | None = None  # set while the loss is being measured
        self.integers: Where = "never"
        self.prologue: SitePrologue | None = None
        self.joined: JoinedLinears | None = None
        self._join: Where = "never"
        self._readers: tuple[PackedLinear, ...] = ()
        self._sums = False  # whether any of them is asymmetric
        self._marker = torch.empty(0)  # moved along: on which device this is

    def use_integers(self, where: Where, readers: Sequence[PackedLinear], join: Where = "on_gpu") -> None:
        """Choose where integers are handed over; weights and transforms must be loaded.

        Args:
            where: "never" undoes it.
            readers: all linears that read the site.
            join: where they are multiplied as one, if they can be: each must read every token. Their weights are then
                in new memory, no longer in that of a checkpoint's file.
        """
        self.integers, self._join, self._readers, self.joined = where, join, tuple(readers), None
        for linear in readers:
            linear.place = linear.offsets = None
        self._marker = torch.empty(0, device=readers[0].codes.device)
        self._prepare()

    def _prepare(self) -> None:
        used = self._here(self.integers, self._marker)
        self.prologue = SitePrologue.of(self.transform, self._marker.device) if used else None
        self._sums = any(linear.zero is not None for linear in self._readers)
        if used and (self._sums or not self.format.symmetric):
            for linear in self._readers:
                linear.prepare_offsets()
        if used and self.joined is None and self._here(self._join, self._marker):
            self.joined = JoinedLinears.of(self._readers)

    @staticmethod
    def _here(where: Where, x: Tensor) -> bool:
        return where == "always" or (where == "on_gpu" and x.is_cuda)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)
        if self.joined is not None:
            self.joined.move(fn)
        if self.integers != "never":
            for linear in self._readers if self.joined is None else ():
                linear._apply(fn)  # which may come after this site, and is joined below
            self._marker = fn(self._marker)
            self._prepare()
        return module

    def forward(  # type: ignore[override]
        self, x_BLD: Tensor, context: Context | None = None, front: Front = None
    ) -> Tensor | IntegerTokens:
        """Return the transformed input on its grid, as values or as integers."""
        if self._here(self.integers, x_BLD):
            assert context is not None and self.prologue is not None
            x_BLD, rest = self.prologue.take(x_BLD, front)
            x_BLD, prologue = self.prologue.split(x_BLD, context, self.state_clip)
            grid = self.format
            tokens = quantize_tokens(x_BLD, grid.bits, grid.clip_ratio, prologue, grid.symmetric, self._sums, rest)
            return tokens if self.joined is None else self.joined.multiply(tokens)
        clip_BLE = None
        if self.state_clip is not None:
            assert context is not None
            clip_BLE = self.state_clip.view(len(self.state_clip), -1).to(x_BLD.device)[context.state_BL]
        x_BLD = super().forward(x_BLD, context, front)
        quantized = fake_quantize(x_BLD, self.format, clip=clip_BLE)
        if self.meter is not None:
            self.meter.update(x_BLD, quantized)
        return quantized

    def validate(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for clip ratios that are none."""
        if self.state_clip is not None and not bool(((self.state_clip > 0) & (self.state_clip <= 1)).all()):
            got = ", ".join(f"{ratio:g}" for ratio in self.state_clip.flatten().tolist())
            raise CheckpointError(f"{name}.state_clip: got {got}, allowed: above 0, at most 1")

    def extra_repr(self) -> str:
        """Show the format."""
        return f"{self.format.bits} bits"
