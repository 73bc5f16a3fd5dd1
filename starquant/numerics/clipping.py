"""Search of clip ratios for weights: how much of the largest magnitude the grid should cover.

Ratios 1, 1 - 1/grid, ... down to above 1 - max_shrink are tried one after the other and the best of each row (or
group) is kept, so memory is a few times the weight's. The ratios multiply the format's own, and go into
`quantize(..., clip=)`.

Shapes: O outputs, I inputs, G groups, S inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from starquant.errors import ConfigError, DataError
from starquant.numerics.chunks import row_slices
from starquant.numerics.formats import PerGroup, QuantFormat
from starquant.numerics.moments import validate_finite_tensor
from starquant.numerics.rounding import grid_of_range, grouped, range_of

#: Numbers that `mse_clip` searches at a time: on the CPU they stay in the cache, on a device they are worth a launch.
#: Our choice.
CHUNK, DEVICE_CHUNK = 2**18, 2**25


def _validate_quantized(fmt: QuantFormat) -> None:
    if not fmt.quantizes:
        raise ConfigError("bits: 16 means full precision; there is nothing to clip")


def _search(
    weight_OI: Tensor, fmt: QuantFormat, error: Callable[[Tensor], Tensor], grid: int, max_shrink: float
) -> Tensor:
    """Return the ratio with the smallest `error` of the grouped difference; the larger ratio where errors are equal."""
    if grid < 1:
        raise ConfigError(f"grid: got {grid}, allowed: at least 1")
    if not 0.0 <= max_shrink <= 1.0:
        raise ConfigError(f"max_shrink: got {max_shrink}, allowed: 0 to 1")
    validate_finite_tensor(weight_OI, "weight")
    runs = grouped(weight_OI, fmt)
    extent = range_of(runs, fmt)
    delta = torch.empty_like(runs)
    best = error(_difference(runs, *grid_of_range(extent, fmt, None), fmt, delta))[..., None]
    clip = torch.ones(best.shape, device=weight_OI.device)
    for i in range(1, round(max_shrink * grid)):
        ratio = torch.full_like(clip, 1.0 - i / grid)
        loss = error(_difference(runs, *grid_of_range(extent, fmt, ratio), fmt, delta))[..., None]
        better = loss < best
        best = torch.where(better, loss, best)
        clip = torch.where(better, ratio, clip)
    return clip


def _difference(runs: Tensor, scale: Tensor, zero: Tensor | None, fmt: QuantFormat, out: Tensor) -> Tensor:
    """Return Q(W) - W on a grid, written into `out`: one pass a step over what stays in the cache."""
    torch.div(runs, scale, out=out).round_()
    if zero is None:
        out.clamp_(fmt.qmin, fmt.qmax)
    else:
        out.add_(zero).clamp_(fmt.qmin, fmt.qmax).sub_(zero)
    return out.mul_(scale).sub_(runs)


def mse_clip(
    weight_OI: Tensor, fmt: QuantFormat, *, norm: float = 2.4, grid: int = 100, max_shrink: float = 0.8
) -> Tensor:
    """Return the clip ratios with the smallest sum |W - Q(W)|^norm, [O, 1] or [O, G, 1], float32.

    Never worse than no clipping under its own norm. Defaults are those of GPTQ's and QuaRot's weight clipping.

    Raises:
        ConfigError: 16 bits, a group size that does not divide, a grid or shrink out of range.
        DataError: a weight that is not finite.
    """
    _validate_quantized(fmt)
    clips = [
        _search(weight_OI[rows], fmt, lambda delta: delta.abs_().pow_(norm).sum(-1), grid, max_shrink)
        for rows in row_slices(weight_OI, CHUNK if weight_OI.device.type == "cpu" else DEVICE_CHUNK)
    ]
    return torch.cat(clips)


def output_clip(weight_OI: Tensor, hessian_II: Tensor, fmt: QuantFormat) -> Tensor:
    """Return the clip ratios with the smallest output error dw H dw^T, H = E[x x^T]; [O, 1] or [O, G, 1], float32.

    Groups are judged one by one, with the diagonal blocks of H (AWQ, arXiv 2306.00978, section 4). Errors are
    computed in float64 on the CPU for I <= 2048, else in float32.

    Raises:
        ConfigError: 16 bits, a group size that does not divide.
        DataError: a weight or H that is not finite, or an H of another size.
    """
    _validate_quantized(fmt)
    inputs = weight_OI.shape[1]
    if hessian_II.shape != (inputs, inputs):
        raise DataError(f"hessian: got shape {list(hessian_II.shape)}, needed: [{inputs}, {inputs}]")
    validate_finite_tensor(hessian_II, "hessian")
    dtype = torch.float64 if inputs <= 2048 and not weight_OI.is_cuda else torch.float32
    h = hessian_II.to(weight_OI.device, torch.float64)
    h = (h / h.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)).to(dtype)
    if isinstance(fmt.granularity, PerGroup):
        size = fmt.granularity.size
        grouped(weight_OI[:0], fmt)  # the group size is judged before H is cut by it
        h_GSS = h.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

        def error(delta: Tensor) -> Tensor:
            delta_GOS = delta.to(dtype).transpose(0, 1)
            error_GO: Tensor = (delta_GOS @ h_GSS * delta_GOS).sum(-1)
            return error_GO.T
    else:

        def error(delta: Tensor) -> Tensor:
            delta = delta.to(dtype)
            return (delta @ h * delta).sum(-1)

    return _search(weight_OI, fmt, error, grid=20, max_shrink=0.5)  # as AWQ's code
