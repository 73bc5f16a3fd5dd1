"""GPTQ: weights rounded one input at a time, the others making up for each error (arXiv 2210.17323).

Computed in float64 on the CPU for up to 2048 inputs, else in float32; numbers are rounded to the grid in float32, as in
`quantize`. H is divided by its mean diagonal first, so its scale does not matter.

Shapes: O outputs, I inputs, B inputs of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.errors import ConfigError, DataError
from starquant.numerics.formats import PerGroup, QuantFormat
from starquant.numerics.moments import validate_finite_tensor
from starquant.numerics.rounding import Quantized, grid_of, grouped, round_to_grid


@dataclass(frozen=True)
class GPTQResult:
    """A solved weight.

    Attributes:
        quantized: codes and scales, laid out as `quantize` does.
        damping: share of the mean diagonal that was finally added to the diagonal of H.
        dead: inputs that calibration never saw active; their weights are zero.
    """

    quantized: Quantized
    damping: float
    dead: int


def gptq(
    weight: Tensor,
    hessian: Tensor,
    fmt: QuantFormat,
    *,
    percdamp: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
    clip: Tensor | None = None,
) -> GPTQResult:
    """Quantize a weight [O, I] so that tr(dW H dW^T) is small, for H = E[x x^T] [I, I] at any positive scale.

    Scales come from the original weight, also those of groups, so that `act_order` (inputs of large second moment
    first) leaves groups as they are. `clip` is that of `quantize`. When H cannot be factorised, damping is raised
    tenfold, up to the larger of 1000 percdamp and the mean diagonal.

    Raises:
        ConfigError: 16 bits, a group size that does not divide, a damping or block size out of range.
        DataError: values that are not finite, an H of another size, or one that no damping makes definite.
    """
    _validate_inputs(weight, hessian, fmt, percdamp, block_size)
    outputs, inputs = weight.shape
    scale, zero = grid_of(grouped(weight, fmt), fmt, clip)
    dtype = torch.float64 if inputs <= 2048 and not weight.is_cuda else torch.float32
    h, dead = _normalised(hessian.to(weight.device, torch.float64))
    if act_order:
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
    else:
        order = torch.arange(inputs, device=weight.device)
    factor, damping = _factorised(h[order][:, order].to(dtype), percdamp)
    w_IO = weight.detach().to(dtype).masked_fill(dead, 0.0).T[order].contiguous()
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else inputs
    columns = _Columns(scale.view(outputs, -1).T, None if zero is None else zero.view(outputs, -1).T, order // size)
    solved = _solve(w_IO, factor, columns, fmt, block_size)
    codes_OI = solved[torch.argsort(order)].T.contiguous()
    if isinstance(fmt.granularity, PerGroup):
        codes_OI = codes_OI.unflatten(1, (-1, size))
    return GPTQResult(Quantized(codes_OI, scale, zero, weight.shape, fmt.qmin), damping, int(dead.sum()))


def _validate_inputs(weight: Tensor, hessian: Tensor, fmt: QuantFormat, percdamp: float, block_size: int) -> None:
    if not fmt.quantizes:
        raise ConfigError("bits: 16 means full precision; there is nothing for GPTQ to quantize")
    if percdamp < 0.0:
        raise ConfigError(f"percdamp: got {percdamp}, allowed: at least 0")
    if block_size < 1:
        raise ConfigError(f"block_size: got {block_size}, allowed: at least 1")
    inputs = weight.shape[1]
    if hessian.shape != (inputs, inputs):
        raise DataError(f"hessian: got shape {list(hessian.shape)}, needed: [{inputs}, {inputs}]")
    validate_finite_tensor(weight, "weight")
    validate_finite_tensor(hessian, "hessian")
    if bool((hessian.diagonal() < 0).any()):
        raise DataError("hessian: has negative numbers on its diagonal, needed: second moments")


def _normalised(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return H over the mean diagonal of its live inputs, with 1 on the diagonal where dead, and which are dead."""
    dead = h.diagonal() == 0
    live = h.diagonal()[~dead]
    h = h / live.mean() if len(live) else h.clone()
    h.diagonal().masked_fill_(dead, 1.0)
    return h, dead


def _factorised(h: Tensor, percdamp: float) -> tuple[Tensor, float]:
    """Return the upper Cholesky factor of (H + damping I)^-1, for the smallest damping that works, and the damping."""
    # A pivot lost in rounding errors counts as a failure: its inverse would be noise, not an error message.
    floor = len(h) * torch.finfo(h.dtype).eps
    damping, last = percdamp, max(1.0, 1000.0 * percdamp)
    while True:
        damped = h.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and float(lower.diagonal().min()) ** 2 > floor:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper, damping
        if damping >= last:
            raise DataError(f"hessian: is not positive definite, even with {damping:g} of its mean diagonal added")
        damping = min(10.0 * damping, last) if damping else 1e-6


@dataclass(frozen=True)
class _Columns:
    """The grid of each input: row `group[i]` of the scales and zero points, both [groups, O]."""

    scale: Tensor
    zero: Tensor | None
    group: Tensor

    def of_block(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        group = self.group[start:stop]
        return self.scale[group], None if self.zero is None else self.zero[group]


def _solve(w_IO: Tensor, factor_II: Tensor, columns: _Columns, fmt: QuantFormat, block_size: int) -> Tensor:
    """Return int16 codes [I, O]; overwrites `w_IO`."""
    codes_IO = torch.empty(w_IO.shape, dtype=torch.int16, device=w_IO.device)
    for start in range(0, len(w_IO), block_size):
        stop = min(start + block_size, len(w_IO))
        scale_BO, zero_BO = columns.of_block(start, stop)
        w_BO, factor_BB = w_IO[start:stop], factor_II[start:stop, start:stop]
        error_BO = torch.empty_like(w_BO)
        for i in range(stop - start):
            zero_O = None if zero_BO is None else zero_BO[i]
            codes_O = round_to_grid(w_BO[i].float(), scale_BO[i], zero_O, fmt)
            codes_IO[start + i] = codes_O.to(torch.int16)
            values_O = (codes_O if zero_O is None else codes_O - zero_O) * scale_BO[i]
            error_BO[i] = (w_BO[i] - values_O) / factor_BB[i, i]
            w_BO[i + 1 :].addr_(factor_BB[i, i + 1 :], error_BO[i], alpha=-1.0)
        # Later blocks catch up on this whole block at once.
        w_IO[stop:].addmm_(factor_II[start:stop, stop:].T, error_BO, alpha=-1.0)
    return codes_IO
