"""Rounding that gradients pass: values of `fake_quantize`, derivatives as if nothing were rounded.

The scale is differentiated through the largest magnitude and the clip ratio, the rounding is not (straight-through
estimator); codes outside the grid pass no gradient to x, but one to the clip ratio.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from starquant.errors import ConfigError
from starquant.numerics.formats import QuantFormat
from starquant.numerics.rounding import grid_of_range, grouped, range_of


def straight_through(x: Tensor, fmt: QuantFormat, clip: Tensor | None = None) -> Tensor:
    """Return `fake_quantize(x, fmt, clip=clip)` in float32, with gradients to x and to the clip ratios.

    Raises:
        ConfigError: a group size that does not divide; a format that does not quantize.
    """
    if not fmt.quantizes:
        raise ConfigError("bits: 16 means full precision; there is nothing to round")
    runs = grouped(x, fmt)
    clip = torch.ones((), device=x.device) if clip is None else clip
    rounded: Tensor = _StraightThrough.apply(runs, clip, fmt)
    return rounded.reshape(x.shape)


class _StraightThrough(torch.autograd.Function):
    """out = s (q - z), q = clamp(round(x / s) + z), with a backward pass of few passes over the numbers.

    Inside the grid d out / d x = 1 and d out / d s = q - z - x / s; outside they are 0 and q - z, and the zero point
    -low / s, taken as if it were not rounded, counts by -s.
    """

    @staticmethod
    def forward(ctx: Any, runs: Tensor, clip: Tensor, fmt: QuantFormat) -> Tensor:
        """Return the rounded numbers."""
        extent = range_of(runs, fmt)
        scale, zero = grid_of_range(extent, fmt, clip)
        codes = torch.round_(runs / scale)
        if zero is not None:
            codes.add_(zero)
        inside = (codes >= fmt.qmin).logical_and_(codes <= fmt.qmax)
        codes.clamp_(fmt.qmin, fmt.qmax)
        if zero is not None:
            codes.sub_(zero)
        ctx.fmt = fmt
        ctx.save_for_backward(runs, clip, scale, codes, inside, *extent)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the numbers and of the clip ratios."""
        runs, clip, scale, codes, inside, *extent = ctx.saved_tensors
        fmt: QuantFormat = ctx.fmt
        gradient = gradients[0]
        through = gradient * inside
        of_scale = torch.linalg.vecdot(gradient, codes) - torch.linalg.vecdot(through, runs) / scale[..., 0]
        of_scale = of_scale[..., None] * (scale > torch.finfo(torch.float32).tiny)
        if fmt.symmetric:
            of_ends = [of_scale]
        else:
            cut = (gradient - through).sum(-1, keepdim=True)
            of_scale = (of_scale - cut * extent[0] * clip / scale) / fmt.qmax
            of_ends = [cut - of_scale, of_scale]
        of_clip = sum(of_end * end for of_end, end in zip(of_ends, extent, strict=True))
        if ctx.needs_input_grad[0]:
            for of_end, (at, slope) in zip(of_ends, _extremes(runs, fmt), strict=True):
                through.scatter_add_(-1, at, of_end * clip * slope)
        return through, of_clip.sum_to_size(clip.shape), None


def _extremes(runs: Tensor, fmt: QuantFormat) -> list[tuple[Tensor, Tensor]]:
    """Return where the ends of each run's range come from, and their derivatives by what stands there."""
    if fmt.symmetric:
        at = runs.abs().max(-1, keepdim=True).indices
        return [(at, runs.gather(-1, at).sign() * (fmt.clip_ratio / fmt.qmax))]
    low, high = runs.min(-1, keepdim=True), runs.max(-1, keepdim=True)
    return [(low.indices, (low.values < 0) * fmt.clip_ratio), (high.indices, (high.values > 0) * fmt.clip_ratio)]
