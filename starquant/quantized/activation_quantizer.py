"""Quantized inputs of linears: one pass for all linears that share the input."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.kernels import IntegerTokens, quantize_tokens
from starquant.models.context import Context
from starquant.models.layers import InputSite
from starquant.numerics import QuantFormat, SqnrMeter, fake_quantize
from starquant.quantized.kernel_prologue import split

#: Where a site hands integers to its linears.
Where = Literal["never", "on_gpu", "always"]


class ActivationQuantizer(InputSite):
    """Transform the input of a group of linears, then quantize it per token, with a scale computed on the fly.

    Args:
        activation_format: the grid; 16 bits leave the values alone.
        transform: applied first; its inverse is folded into the weights that read the site.
        state_clip: clip ratios [2], of masked and of other tokens, on top of the format's.
    """

    def __init__(
        self, activation_format: QuantFormat, transform: nn.Module | None = None, state_clip: Tensor | None = None
    ) -> None:
        super().__init__(transform, state_clip)
        self.format = activation_format
        self.meter: SqnrMeter | None = None  # set while the loss is being measured
        self.integers: Where = "never"

    def forward(self, x_BLD: Tensor, context: Context | None = None) -> Tensor | IntegerTokens:  # type: ignore[override]
        """Return the transformed input on its grid, as values or as integers."""
        if self.integers == "always" or (self.integers == "on_gpu" and x_BLD.is_cuda):
            assert context is not None
            x_BLD, before = split(self.transform, self.state_clip, x_BLD, context)
            return quantize_tokens(x_BLD, self.format.bits, self.format.clip_ratio, before)
        clip_BL1 = None
        if self.state_clip is not None:
            assert context is not None
            masked, other = self.state_clip.to(x_BLD.device)
            clip_BL1 = torch.where(context.masked_BL, masked, other)[..., None]
        x_BLD = super().forward(x_BLD, context)
        quantized = fake_quantize(x_BLD, self.format, clip=clip_BL1)
        if self.meter is not None:
            self.meter.update(x_BLD, quantized)
        return quantized

    def check(self, name: str) -> None:
        """Judge what was read; raises CheckpointError for clip ratios that are not positive."""
        if self.state_clip is not None and not bool((self.state_clip > 0).all()):
            got = ", ".join(f"{ratio:g}" for ratio in self.state_clip.tolist())
            raise CheckpointError(f"{name}.state_clip: got {got}, allowed: above 0")

    def extra_repr(self) -> str:
        """Show the format."""
        return f"{self.format.bits} bits"
