"""Rounding that gradients pass: values of `fake_quantize`, derivatives as if nothing were rounded.

The scale is differentiated through the largest magnitude and the clip ratio, the rounding is not (straight-through
estimator); codes outside the grid pass no gradient to x, but one to the clip ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.errors import ConfigError
from starquant.numerics.formats import QuantFormat
from starquant.numerics.rounding import grouped


def straight_through(x: Tensor, fmt: QuantFormat, clip: Tensor | None = None) -> Tensor:
    """Return `fake_quantize(x, fmt, clip=clip)` in float32, with gradients to x and to the clip ratios.

    Raises:
        ConfigError: a group size that does not divide; a format that does not quantize.
    """
    if not fmt.quantizes:
        raise ConfigError("bits: 16 means full precision; there is nothing to round")
    runs = grouped(x, fmt)
    tiny = torch.finfo(torch.float32).tiny
    clip = torch.ones((), device=x.device) if clip is None else clip
    if fmt.symmetric:  # in the order of `grid_of`, so that ties fall alike
        scale = (runs.abs().amax(-1, keepdim=True) * (fmt.clip_ratio / fmt.qmax) * clip).clamp_min(tiny)
        zero: Tensor | float = 0.0
    else:
        low = runs.amin(-1, keepdim=True).clamp_max(0.0) * fmt.clip_ratio * clip
        high = runs.amax(-1, keepdim=True).clamp_min(0.0) * fmt.clip_ratio * clip
        scale = ((high - low) / fmt.qmax).clamp_min(tiny)
        zero = _rounded(-low / scale)
    codes = (_rounded(runs / scale) + zero).clamp(fmt.qmin, fmt.qmax)
    return ((codes - zero) * scale).reshape(x.shape)


def _rounded(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()
