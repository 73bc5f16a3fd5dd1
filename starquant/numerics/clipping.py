"""Search of clip ratios for weights: how much of the largest magnitude the grid should cover.

Ratios 1, 1 - 1/grid, ... down to above 1 - max_shrink are tried one after the other and the best of each row (or
group) is kept, so memory is a few times the weight's. The ratios multiply the format's own, and go into
`quantize(..., clip=)`.

Shapes: O outputs, I inputs, G groups, S inputs of a group, M runs (rows or groups) of N numbers, R ratios.
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

#: Numbers of a run from which on powers are left out: of shorter ones more are needed, and sums cost more.
PRUNED = 64
#: Errors below it may have lost numbers that float32 does not hold: all of their ratios are tried.
SMALLEST = 1e-30
#: By which a bound and an error may differ for being computed in float32.
SLACK = 1e-3
#: Numbers that `mse_clip` searches at a time: on the CPU they stay in the cache, on a device they are worth a launch.
#: Our choice.
CHUNK, DEVICE_CHUNK = 2**18, 2**25


def _validate_quantized(fmt: QuantFormat) -> None:
    if not fmt.quantizes:
        raise ConfigError("bits: 16 means full precision; there is nothing to clip")


def _ratios(grid: int, max_shrink: float) -> Tensor:
    """Return the ratios that are tried, 1 first; raises ConfigError."""
    if grid < 1:
        raise ConfigError(f"grid: got {grid}, allowed: at least 1")
    if not 0.0 <= max_shrink <= 1.0:
        raise ConfigError(f"max_shrink: got {max_shrink}, allowed: 0 to 1")
    return torch.tensor([1.0 - i / grid for i in range(max(1, round(max_shrink * grid)))])


def _search(
    weight_OI: Tensor, fmt: QuantFormat, error: Callable[[Tensor], Tensor], grid: int, max_shrink: float
) -> Tensor:
    """Return the ratio with the smallest `error` of the grouped difference; the larger ratio where errors are equal."""
    ratios = _ratios(grid, max_shrink).tolist()
    validate_finite_tensor(weight_OI, "weight")
    runs = grouped(weight_OI, fmt)
    extent = range_of(runs, fmt)
    delta = torch.empty_like(runs)
    best = error(_difference(runs, *grid_of_range(extent, fmt, None), fmt, delta))[..., None]
    clip = torch.ones(best.shape, device=weight_OI.device)
    for number in ratios[1:]:
        ratio = torch.full_like(clip, number)
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
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else weight_OI.shape[1]
    search = _pruned_search if norm >= 2.0 and size >= PRUNED else _power_search
    clips = [
        search(weight_OI[rows], fmt, norm, grid, max_shrink)
        for rows in row_slices(weight_OI, CHUNK if weight_OI.device.type == "cpu" else DEVICE_CHUNK)
    ]
    return torch.cat(clips)


def _power_search(weight_OI: Tensor, fmt: QuantFormat, norm: float, grid: int, max_shrink: float) -> Tensor:
    return _search(weight_OI, fmt, lambda delta: delta.abs_().pow_(norm).sum(-1), grid, max_shrink)


class _Runs:
    """Numbers that share a scale, to be rounded on grids of clipped ranges; differences lie in one buffer."""

    def __init__(self, runs_MN: Tensor, extent: tuple[Tensor, ...], fmt: QuantFormat) -> None:
        self.runs_MN, self.extent, self.fmt = runs_MN, extent, fmt
        self._delta_MN = torch.empty_like(runs_MN)

    def magnitude(self, ratio: Tensor) -> Tensor:
        """Return |Q(W) - W| of the first runs under a ratio each, [M, 1], or of all under one."""
        rows = slice(len(ratio) if ratio.dim() else None)
        grid = grid_of_range(tuple(end_M1[rows] for end_M1 in self.extent), self.fmt, ratio)
        return _difference(self.runs_MN[rows], *grid, self.fmt, self._delta_MN[rows]).abs_()

    def ordered(self, order_M: Tensor) -> _Runs:
        """Return the same in another order."""
        return _Runs(self.runs_MN[order_M], tuple(end_M1[order_M] for end_M1 in self.extent), self.fmt)


def _pruned_search(weight_OI: Tensor, fmt: QuantFormat, norm: float, grid: int, max_shrink: float) -> Tensor:
    """Return what `_power_search` does, with a third of its powers, which are what takes the time.

    For p >= 2 sum |d|^p is at least (sum d^2)^(p-1) / (sum |d|)^(p-2) (Lyapunov's inequality): these sums are taken of
    all ratios, and powers where the bound does not exceed the error at the ratio of the smallest bound.
    """
    ratios_R = _ratios(grid, max_shrink).to(weight_OI.device)
    validate_finite_tensor(weight_OI, "weight")
    grouped_MN = grouped(weight_OI, fmt)
    runs_MN = grouped_MN.flatten(0, -2)
    runs = _Runs(runs_MN, range_of(runs_MN, fmt), fmt)
    bound_RM = torch.stack([_bound(runs.magnitude(ratio), norm) for ratio in ratios_R])
    error_M = runs.magnitude(ratios_R[bound_RM.argmin(0)][:, None]).pow_(norm).sum(-1)
    tried_RM = bound_RM <= error_M.clamp_min_(SMALLEST)
    count_M, order_M = tried_RM.sum(0).sort(descending=True, stable=True)
    numbers_R = torch.arange(len(ratios_R), device=order_M.device)
    which_RM = torch.where(tried_RM, numbers_R[:, None], len(ratios_R))[:, order_M].sort(0).values
    runs, chosen_M = runs.ordered(order_M), torch.zeros_like(order_M)
    best_M = torch.full_like(error_M, torch.inf)
    for turn, most in enumerate((count_M > numbers_R[:, None]).sum(1).tolist()):  # one ratio of who has so many to try
        if not most:
            break
        which_M = which_RM[turn, :most]
        error_M = runs.magnitude(ratios_R[which_M][:, None]).pow_(norm).sum(-1)
        better_M = error_M < best_M[:most]
        best_M[:most] = torch.where(better_M, error_M, best_M[:most])
        chosen_M[:most] = torch.where(better_M, which_M, chosen_M[:most])
    clip_M = torch.empty_like(best_M)
    clip_M[order_M] = ratios_R[chosen_M]
    return clip_M.reshape(*grouped_MN.shape[:-1], 1)


def _bound(magnitude_MN: Tensor, norm: float) -> Tensor:
    """Return a number below each run's sum of powers; magnitudes are overwritten."""
    sum_M = magnitude_MN.sum(-1).clamp_min_(torch.finfo(torch.float32).tiny)
    square_M = magnitude_MN.square_().sum(-1)
    return (square_M / sum_M).pow_(norm - 2.0).mul_(square_M).mul_(1.0 - SLACK)


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
