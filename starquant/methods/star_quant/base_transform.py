"""The base transform P of STaR-Quant: one matrix a group of linears, fixed, in closed form or learned.

Q(x P) Q(W P^-T)^T approximates x W^T better than Q(x) Q(W)^T does. P is orthogonal (then P^-T = P), but for a map in
front of it that may be invertible (`balance`). It starts from QuaRot's rotation (the residual stream's,
and Hadamard matrices at the sites behind no norm); what is learned on top of it is

- "dense": a matrix of its own at every site, multiplied online;
- "kronecker": likewise, as a product of two small ones;
- "shared": one matrix of the whole residual stream, folded into the weights, free at run time; sites behind no norm
  have their own.

Shapes: N rows (tokens), D width of the site, O outputs of all linears that read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.errors import DataError
from starquant.numerics import (
    BIDIRECTIONAL,
    QuantFormat,
    States,
    TokenState,
    apply_kronecker,
    fake_quantize,
    gate_channels,
    mse_clip,
)

COARSE: Any = {"grid": 20, "max_shrink": 0.5}  # search of weight clips while P is learned and judged
DIVERGED = "the learned transform is not finite; lower method.transform.learning_rate or clip_learning_rate"


@contextmanager
def divergence_named(where: str) -> Iterator[None]:
    """Raise DataError that says what to do when a transform that is learned diverges, not solvable or not finite."""
    try:
        yield
    except (torch.linalg.LinAlgError, DataError):  # type: ignore[attr-defined]
        raise DataError(f"{where}: {DIVERGED}") from None


@dataclass(frozen=True)
class Group:
    """What a transform is learned for: the linears of one site and rows of what they read.

    Attributes:
        weights: of each linear, [O, D].
        rows_SND: rows of each state, [N_s, D], in the order of `states`.
        weight_format: grid of the weights.
        activation_format: grid of the rows.
        gate: (d_m, d_u).
        mse_clip: whether weights are clipped.
        states: token states that it is learned on, masked first.
    """

    weights: Sequence[Tensor]
    rows_SND: tuple[Tensor, ...]
    weight_format: QuantFormat
    activation_format: QuantFormat
    gate: tuple[int, int]
    mse_clip: bool
    states: States = BIDIRECTIONAL

    @property
    def rounds(self) -> bool:
        """Whether there is an error to learn from."""
        return self.activation_format.quantizes or self.weight_format.quantizes


@dataclass(frozen=True)
class Transform:
    """P of one factor (dense), two (Kronecker), or none (the identity): x becomes x P, a weight's rows W P^-T.

    Attributes:
        factors: of P.
        duals: of P^-T; none where P is orthogonal, and both are one.
    """

    factors: Sequence[Tensor]
    duals: Sequence[Tensor] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return x P."""
        return _applied(x, self.factors)

    def of_weight(self, weight_OD: Tensor) -> Tensor:
        """Return W P^-T."""
        return _applied(weight_OD, self.duals or self.factors)

    def to(self, like: Tensor) -> Transform:
        """Return it in the dtype and on the device of a tensor."""
        return Transform([factor.to(like) for factor in self.factors], [dual.to(like) for dual in self.duals])

    def turned(self, rotations: Sequence[Tensor]) -> Transform:
        """Return P R: each factor times an orthogonal one."""

        def times(matrices: Sequence[Tensor]) -> list[Tensor]:
            return [matrix @ rotation for matrix, rotation in zip(matrices, rotations, strict=True)]

        return Transform(times(self.factors), times(self.duals) if self.duals else ())


def _applied(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    if len(factors) == 2:
        return apply_kronecker(x, *factors)
    return x @ factors[0] if factors else x


@dataclass(frozen=True)
class Learned:
    """A transform in float32 and the clip ratios [S] of each token state that it was learned on."""

    transform: Transform
    state_clip: Tensor | None


def gated(x_ND: Tensor, state: TokenState, gate: tuple[int, int]) -> Tensor:
    """Return rows of one state with the channels that it does not use at zero (`numerics.gate_channels`)."""
    keep_GD = gate_channels(x_ND.shape[1], *gate, x_ND.device)
    return x_ND * keep_GD[int(state is not TokenState.MASKED)].to(x_ND.dtype)


def output_errors(group: Group, transform: Transform, state_clip: Tensor | None) -> tuple[float, ...]:
    """Return the relative squared error of the group's output, of the tokens of each state, with real rounding."""
    weight_OD = torch.cat([weight.float() for weight in group.weights])
    mapped_OD = transform.of_weight(weight_OD)
    searched = group.mse_clip and group.weight_format.quantizes
    clip = mse_clip(mapped_OD, group.weight_format, **COARSE) if searched else None
    mapped_OD = fake_quantize(mapped_OD, group.weight_format, clip=clip)
    errors = []
    for axis, (state, rows_ND) in enumerate(zip(group.states, group.rows_SND, strict=True)):
        target = rows_ND.float() @ weight_OD.T
        x_ND = gated(transform(rows_ND.float()), state, group.gate)
        ratio = None if state_clip is None else state_clip[axis].to(x_ND.device)
        x_ND = fake_quantize(x_ND, group.activation_format, clip=ratio)
        errors.append(float((x_ND @ mapped_OD.T - target).square().sum() / target.square().sum().clamp_min(1e-30)))
    return tuple(errors)
