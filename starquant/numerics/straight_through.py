"""Rounding that gradients pass: values of `fake_quantize`, derivatives as if nothing were rounded.

The scale is differentiated through the largest magnitude and the clip ratio, the rounding is not (straight-through
estimator); codes outside the grid pass no gradient to x, but one to the clip ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.errors import ConfigError
from starquant.numerics.formats import QuantFormat
from starquant.numerics.rounding import grid_of, grouped, stored_scale


def straight_through(x: Tensor, fmt: QuantFormat, clip: Tensor | None = None) -> Tensor:
    """Return `fake_quantize(x, fmt, clip=clip)` in float32, with gradients to x and to the clip ratios, [..., 1 or 2].

    Raises:
        ConfigError: a group size that does not divide; a format that does not quantize.
    """
    if not fmt.quantizes:
        raise ConfigError("bits: 16 means full precision; there is nothing to round")
    runs = grouped(x, fmt)
    clip = torch.ones(1, device=x.device) if clip is None else clip.reshape(1) if clip.dim() == 0 else clip
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
        scale, zero = grid_of(runs, fmt, clip)
        codes = torch.round_(runs / scale)
        if zero is not None:
            codes.add_(zero)
        inside = (codes >= fmt.qmin).logical_and_(codes <= fmt.qmax)
        codes.clamp_(fmt.qmin, fmt.qmax)
        if zero is not None:
            codes.sub_(zero)
        ctx.fmt = fmt
        ctx.save_for_backward(runs, clip, scale, codes, inside)
        return codes * stored_scale(scale, fmt)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the numbers and of the clip ratios."""
        runs, clip, scale, codes, inside = ctx.saved_tensors
        fmt: QuantFormat = ctx.fmt
        gradient = gradients[0]
        through = gradient * inside
        of_scale = torch.linalg.vecdot(gradient, codes) - torch.linalg.vecdot(through, runs) / scale[..., 0]
        of_scale = of_scale[..., None] * (scale.abs() > torch.finfo(torch.float32).tiny)
        ends = _ends(runs, fmt, clip)
        if fmt.symmetric:
            of_ends = [of_scale] * len(ends)
        else:
            cut = (gradient - through).sum(-1, keepdim=True)
            of_scale = (of_scale - cut * ends[0].reach * ends[0].clip / scale) / fmt.qmax
            of_ends = [cut - of_scale, of_scale]
        of_clip = [torch.zeros_like(of_scale) for _ in range(clip.shape[-1])]
        for of_end, end in zip(of_ends, ends, strict=True):
            of_clip[end.column] = of_clip[end.column] + of_end * end.reach
            if ctx.needs_input_grad[0]:
                through.scatter_add_(-1, end.at, of_end * end.clip * end.slope)
        return through, torch.cat(of_clip, -1).sum_to_size(clip.shape), None


@dataclass(frozen=True)
class _End:
    """One end of the range of each run, before its clip ratio.

    Attributes:
        at: where it comes from.
        reach: how far it goes; of a symmetric grid, the scale. 0 where the other end is the longer one.
        slope: its derivative by what stands there.
        clip: its ratio.
        column: of the ratio among those of a run.
    """

    at: Tensor
    reach: Tensor
    slope: Tensor
    clip: Tensor
    column: int


def _ends(runs: Tensor, fmt: QuantFormat, clip: Tensor) -> list[_End]:
    """Return what the scale of each run is made of; an asymmetric grid has its smallest number first."""
    per_code = fmt.clip_ratio / fmt.qmax if fmt.symmetric else fmt.clip_ratio
    if fmt.symmetric and clip.shape[-1] == 1:
        at = runs.abs().max(-1, keepdim=True).indices
        largest = runs.gather(-1, at)
        if fmt.block == "q4_0":
            signed = torch.full_like(largest, fmt.clip_ratio / fmt.qmin)
            return [_End(at, largest * signed, signed, clip, 0)]
        return [_End(at, largest.abs() * per_code, largest.sign() * per_code, clip, 0)]
    (low, low_at), (high, high_at) = runs.min(-1, keepdim=True), runs.max(-1, keepdim=True)
    below, above = (low < 0) * per_code, (high > 0) * per_code
    columns = (clip.shape[-1] - 1, 0)
    clips = [clip[..., column : column + 1] for column in columns]
    if fmt.symmetric:
        upper = high * above * clips[1] >= -low * below * clips[0]
        below, above = -below * ~upper, above * upper
    return [
        _End(low_at, low * below, below, clips[0], columns[0]),
        _End(high_at, high * above, above, clips[1], columns[1]),
    ]
