"""GPTQ: weights rounded one input at a time, the others making up for each error (arXiv 2210.17323).

With H = U U^T, U upper triangular, an input j is rounded at w_j + sum_{i<j} (w_i - q_i) U_ij / U_jj: what GPTQ's factor
of the inverse of H gives, without an inverse (LDLQ, theorem 6 of QuIP, arXiv 2307.13304).

Linears that read the same input share H, and what is computed of it (`factorize`). Computed in float64 on the CPU for
up to 2048 inputs, else in float32; numbers are rounded to the grid in float32, as in `quantize`. H is divided by its
mean diagonal first, so its scale does not matter.

Shapes: O outputs, I inputs, B inputs of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.errors import ConfigError, DataError
from starquant.numerics.chunks import row_slices
from starquant.numerics.formats import PerGroup, QuantFormat
from starquant.numerics.moments import validate_finite_tensor
from starquant.numerics.rounding import Quantized, grid_of, grouped, round_to_grid, stored_scale


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


@dataclass(frozen=True)
class Factor:
    """What GPTQ takes of H.

    Attributes:
        upper_II: U, upper triangular with U U^T = H + damping I, in the order that inputs are solved in.
        order_I: that order; None for the natural one.
        dead_I: inputs that calibration never saw active.
        damping: share of the mean diagonal that was finally added to the diagonal of H.
        scale: the mean diagonal, which H was divided by.
    """

    upper_II: Tensor
    order_I: Tensor | None
    dead_I: Tensor
    damping: float
    scale: Tensor


def factorize(
    hessian: Tensor, *, percdamp: float = 0.01, act_order: bool = False, device: torch.device | None = None
) -> Factor:
    """Return what `gptq` needs of H = E[x x^T] [I, I], at any positive scale.

    Three matrices of I x I are held at most, H among them; H itself is not changed.

    Args:
        hessian: H.
        percdamp: share of the mean diagonal that is added to the diagonal. When H cannot be factorised, it is raised
            tenfold, up to the larger of 1000 percdamp and the mean diagonal.
        act_order: solve inputs of large second moment first.
        device: where the factor is wanted; None for where H is.

    Raises:
        ConfigError: a damping out of range.
        DataError: values that are not finite, or an H that no damping makes definite.
    """
    if percdamp < 0.0:
        raise ConfigError(f"percdamp: got {percdamp}, allowed: at least 0")
    inputs, device = len(hessian), hessian.device if device is None else device
    if hessian.shape != (inputs, inputs):
        raise DataError(f"hessian: got shape {list(hessian.shape)}, needed: a square")
    for rows in row_slices(hessian):
        validate_finite_tensor(hessian[rows], "hessian")
    diagonal_I = hessian.diagonal().to(device, torch.float64)
    if bool((diagonal_I < 0).any()):
        raise DataError("hessian: has negative numbers on its diagonal, needed: second moments")
    dead_I = diagonal_I == 0
    scale = diagonal_I[~dead_I].mean() if not bool(dead_I.all()) else torch.ones((), dtype=torch.float64, device=device)
    sizes_I = (diagonal_I / scale).masked_fill_(dead_I, 1.0)
    order_I = torch.argsort(sizes_I, descending=True, stable=True) if act_order else None
    dtype = torch.float64 if inputs <= 2048 and device.type == "cpu" else torch.float32
    upper_II, damping = _factorised(_turned(hessian, order_I, dead_I, scale, dtype), percdamp)
    return Factor(upper_II, order_I, dead_I, damping, scale)


def _turned(hessian: Tensor, order_I: Tensor | None, dead_I: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return H / scale with 1 on the diagonal where dead, its inputs in the reverse of the order they are solved in."""
    inputs = len(hessian)
    natural = torch.arange(inputs, device=dead_I.device)
    back_I = (natural if order_I is None else order_I).flip(0)
    turned_II = torch.empty(inputs, inputs, dtype=dtype, device=dead_I.device)
    for rows in row_slices(turned_II):
        chosen = back_I[rows].to(hessian.device)
        part = hessian[chosen].to(dead_I.device, torch.float64) / scale
        turned_II[rows] = part[:, back_I].to(dtype)
    turned_II.diagonal().masked_fill_(dead_I[back_I], 1.0)
    return turned_II


def made_up(weight: Tensor, factor: Factor, moved_II: Tensor, share: float) -> Tensor:
    """Return the weight [O, I] that makes up for what has become of its inputs: W + share W C (H + damping)^-1.

    At share 1, and but for the damping, it minimises E|W x - V q|^2 over V: x is what the linear would read at full
    precision, q what it does. (QEP, arXiv 2504.09629.)

    Args:
        weight: W.
        factor: of H = E[q q^T].
        moved_II: C = E[(x - q) q^T], at the scale of H.
        share: QEP's strength of propagation, 0 to 1.
    """
    upper_II = factor.upper_II
    order_I = torch.arange(len(upper_II), device=upper_II.device) if factor.order_I is None else factor.order_I
    error_OI = weight.to(upper_II) @ moved_II.to(upper_II) / factor.scale.to(upper_II)
    half_OI = torch.linalg.solve_triangular(upper_II.T, error_OI[:, order_I], upper=False, left=False)
    solved_OI: Tensor = torch.linalg.solve_triangular(upper_II, half_OI, upper=True, left=False)
    solved_OI = solved_OI[:, torch.argsort(order_I)].to(weight)
    return weight + share * solved_OI


def gptq(
    weight: Tensor,
    hessian: Tensor | Factor,
    fmt: QuantFormat,
    *,
    percdamp: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
    clip: Tensor | None = None,
) -> GPTQResult:
    """Quantize a weight [O, I] so that tr(dW H dW^T) is small, for H = E[x x^T] [I, I] at any positive scale.

    Scales come from the original weight, also those of groups, so that `act_order` leaves groups as they are. `clip` is
    that of `quantize`. `percdamp` and `act_order` are those of `factorize`, of no effect where H is factorised already.

    Raises:
        ConfigError: 16 bits, a group size that does not divide, a damping or block size out of range.
        DataError: values that are not finite, an H of another size, or one that no damping makes definite.
    """
    _validate_inputs(weight, fmt, block_size)
    outputs, inputs = weight.shape
    factor = hessian
    if not isinstance(factor, Factor):
        factor = factorize(factor, percdamp=percdamp, act_order=act_order, device=weight.device)
    if len(factor.dead_I) != inputs:
        raise DataError(f"hessian: got {len(factor.dead_I)} inputs, needed: {inputs}")
    scale, zero = grid_of(grouped(weight, fmt), fmt, clip)
    scale = stored_scale(scale, fmt)
    order = torch.arange(inputs, device=weight.device) if factor.order_I is None else factor.order_I
    w_IO = weight.detach().to(factor.upper_II.dtype).masked_fill(factor.dead_I, 0.0).T[order].contiguous()
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else inputs
    columns = _Columns(scale.view(outputs, -1).T, None if zero is None else zero.view(outputs, -1).T, order // size)
    solved = _solve(w_IO, factor.upper_II, columns, fmt, block_size)
    codes_OI = solved[torch.argsort(order)].T.contiguous()
    if isinstance(fmt.granularity, PerGroup):
        codes_OI = codes_OI.unflatten(1, (-1, size))
    return GPTQResult(
        Quantized(codes_OI, scale, zero, weight.shape, fmt.qmin), factor.damping, int(factor.dead_I.sum())
    )


def _validate_inputs(weight: Tensor, fmt: QuantFormat, block_size: int) -> None:
    if not fmt.quantizes:
        raise ConfigError("bits: 16 means full precision; there is nothing for GPTQ to quantize")
    if block_size < 1:
        raise ConfigError(f"block_size: got {block_size}, allowed: at least 1")
    validate_finite_tensor(weight, "weight")


def _factorised(turned_II: Tensor, percdamp: float) -> tuple[Tensor, float]:
    """Return the upper triangular U with U U^T = H + damping I, for the smallest damping that works, and it.

    With the inputs in reverse order H = L L^T; turned back, L is U. Overwrites its argument.
    """
    # A pivot lost in rounding errors counts as a failure: what is divided by it would be noise, not an error message.
    floor = len(turned_II) * torch.finfo(turned_II.dtype).eps
    diagonal_I = turned_II.diagonal().clone()
    damping, last = percdamp, max(1.0, 1000.0 * percdamp)
    while True:
        turned_II.diagonal().copy_(diagonal_I + damping)
        lower_II, failed = torch.linalg.cholesky_ex(turned_II)
        if not int(failed) and float(lower_II.diagonal().min()) ** 2 > floor:
            del turned_II  # one of them has to go before the next is made
            return torch.flip(lower_II, (0, 1)), damping
        del lower_II
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


def _solve(w_IO: Tensor, upper_II: Tensor, columns: _Columns, fmt: QuantFormat, block_size: int) -> Tensor:
    """Return int16 codes [I, O]."""
    codes_IO = torch.empty(w_IO.shape, dtype=torch.int16, device=w_IO.device)
    owed_IO = torch.zeros_like(w_IO)  # sum over the inputs that are solved of error_i U_ij
    for start in range(0, len(w_IO), block_size):
        stop = min(start + block_size, len(w_IO))
        scale_BO, zero_BO = columns.of_block(start, stop)
        w_BO, owed_BO, upper_BB = w_IO[start:stop], owed_IO[start:stop], upper_II[start:stop, start:stop]
        error_BO = torch.empty_like(w_BO)
        for i in range(stop - start):
            zero_O = None if zero_BO is None else zero_BO[i]
            target_O = w_BO[i] + owed_BO[i] / upper_BB[i, i]
            codes_O = round_to_grid(target_O.float(), scale_BO[i], zero_O, fmt)
            codes_IO[start + i] = codes_O.to(torch.int16)
            values_O = (codes_O if zero_O is None else codes_O - zero_O) * scale_BO[i]
            error_BO[i] = w_BO[i] - values_O
            owed_BO[i + 1 :].addr_(upper_BB[i, i + 1 :], error_BO[i])
        # Later blocks catch up on this whole block at once.
        owed_IO[stop:].addmm_(upper_II[start:stop, stop:].T, error_BO)
    return codes_IO
