"""The base transform P of STaR-Quant: one orthogonal matrix a group of linears, fixed, in closed form or learned.

Q(x P) Q(W P)^T approximates x W^T better than Q(x) Q(W)^T does. P starts from QuaRot's rotation (the residual stream's,
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

from starquant.config.methods.star_quant import TransformOptions
from starquant.errors import DataError
from starquant.numerics import (
    QuantFormat,
    TokenState,
    apply_kronecker,
    cayley,
    fake_quantize,
    gate_channels,
    mse_clip,
    straight_through,
)
from starquant.session.progress import SILENT, Progress

CLIP_LOGIT = 4.0  # clip ratios start at its sigmoid, 0.98
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
        rows_SND: rows of each state, [N_s, D], in the order of `TokenState`.
        weight_format: grid of the weights.
        activation_format: grid of the rows.
        gate: (d_m, d_u).
        mse_clip: whether weights are clipped.
    """

    weights: Sequence[Tensor]
    rows_SND: tuple[Tensor, Tensor]
    weight_format: QuantFormat
    activation_format: QuantFormat
    gate: tuple[int, int]
    mse_clip: bool

    @property
    def rounds(self) -> bool:
        """Whether there is an error to learn from."""
        return self.activation_format.quantizes or self.weight_format.quantizes


@dataclass(frozen=True)
class Transform:
    """An orthogonal P of one factor (dense), two (Kronecker), or none (the identity); x becomes x P on both sides."""

    factors: Sequence[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Return x P."""
        if len(self.factors) == 2:
            return apply_kronecker(x, *self.factors)
        return x @ self.factors[0] if self.factors else x

    def to(self, like: Tensor) -> Transform:
        """Return it in the dtype and on the device of a tensor."""
        return Transform([factor.to(like) for factor in self.factors])


@dataclass(frozen=True)
class Learned:
    """A transform in float32 and the clip ratios [2] of each token state."""

    transform: Transform
    state_clip: Tensor | None


def gated(x_ND: Tensor, state: TokenState, gate: tuple[int, int]) -> Tensor:
    """Return rows of one state with the channels that it does not use at zero (`numerics.gate_channels`)."""
    return x_ND * gate_channels(x_ND.shape[1], *gate, x_ND.device)[state.axis].to(x_ND.dtype)


class _Free:
    """What is learned: Cayley parameters of each factor, clip ratios of both token states."""

    def __init__(self, start: Sequence[Tensor], group: Group, options: TransformOptions, rotate: bool) -> None:
        device = group.weights[0].device
        self.start, self.rotate = [factor.to(device) for factor in start], rotate
        self.free = [torch.zeros_like(factor, dtype=torch.float32, requires_grad=rotate) for factor in self.start]
        clips = options.state_clip and group.activation_format.quantizes
        self.logits_S = torch.full((2,), CLIP_LOGIT, device=device, requires_grad=clips)

    def groups(self, options: TransformOptions) -> list[dict[str, Any]]:
        """Return the tensors that learn, with their learning rates."""
        rates = [options.learning_rate] * len(self.free) + [options.clip_learning_rate]
        tensors = [*self.free, self.logits_S]
        return [{"params": [t], "lr": rate} for t, rate in zip(tensors, rates, strict=True) if t.requires_grad]

    def transform(self) -> Transform:
        """Return the transform as it stands, differentiable."""
        pairs = zip(self.start, self.free, strict=True)
        return Transform([s.float() @ cayley(f) if self.rotate else s.float() for s, f in pairs])

    def state_clip(self) -> Tensor | None:
        """Return the clip ratios, differentiable."""
        return self.logits_S.sigmoid() if self.logits_S.requires_grad else None

    def result(self) -> Learned:
        """Return what was learned, P composed in float64."""
        pairs = zip(self.start, self.free, strict=True)
        factors = [(s @ cayley(f.detach().double())).float() if self.rotate else s.float() for s, f in pairs]
        clip = self.state_clip()
        return Learned(Transform(factors), None if clip is None else clip.detach())


def learn(group: Group, start: Sequence[Tensor], options: TransformOptions, rotate: bool = True) -> Learned:
    """Learn P = start x Cayley by Adam on the error of the group's output, through straight-through rounding.

    The error is the sum over token states of |x W^T - Q(x P G_s) Q(W P)^T|^2 / |x W^T|^2 (STaR-Quant's objective,
    each state relative to its own size: our choice). Gates act while P is learned, so that both adapt (FreeAct).

    Args:
        group: linears and rows.
        start: orthogonal factors in float64: one for dense, two for Kronecker.
        options: how it is learned.
        rotate: learn P; else only the clip ratios.

    Raises:
        DataError: what was learned is not finite.
    """
    with torch.enable_grad():
        free = _Free(start, group, options, rotate)
        optimizer = torch.optim.Adam(free.groups(options))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        loss_of = _Loss(group)
        if not rotate:
            loss_of.keep(free.transform())
        for step in range(options.steps):
            transform = free.transform()
            if rotate and group.mse_clip and step % options.clip_every == 0:
                loss_of.clip_weights(transform)
            loss = loss_of(transform, free.state_clip())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    learned = free.result()
    if not all(bool(torch.isfinite(factor).all()) for factor in learned.transform.factors):
        raise DataError("the learned transform is not finite")
    return learned


def learn_shared(groups: Sequence[Group], options: TransformOptions, progress: Progress = SILENT) -> Tensor:
    """Learn one dense P for all groups, from the identity; returns it in float64.

    There are `options.steps` rounds over the groups, one group a step.

    Raises:
        DataError: what is learned is not finite.
        torch.linalg.LinAlgError: on the way, P could not be solved for.
    """
    weight_OD = groups[0].weights[0]
    width, device = weight_OD.shape[1], weight_OD.device
    with torch.enable_grad():
        free_DD = torch.zeros(width, width, dtype=torch.float32, device=device, requires_grad=True)
        logits_GS = torch.full((len(groups), 2), CLIP_LOGIT, device=device, requires_grad=options.state_clip)
        learning: list[dict[str, Any]] = [{"params": [free_DD]}]
        if options.state_clip:
            learning.append({"params": [logits_GS], "lr": options.clip_learning_rate})
        optimizer = torch.optim.Adam(learning, lr=options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps * len(groups))
        losses = [_Loss(group) for group in groups]
        for step in progress.bar(range(options.steps), "shared transform", "step"):
            for index, loss_of in enumerate(losses):
                transform = Transform([cayley(free_DD)])
                if loss_of.group.mse_clip and step % options.clip_every == 0:
                    loss_of.clip_weights(transform)
                loss = loss_of(transform, logits_GS[index].sigmoid() if options.state_clip else None)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    learned_DD = cayley(free_DD.detach().double())
    if not bool(torch.isfinite(learned_DD).all()):
        raise DataError("the learned transform is not finite")
    return learned_DD


class _Loss:
    """The error of a group's output as a function of P, with weight clip ratios that are searched now and then."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.clip: Tensor | None = None
        self.kept: tuple[Tensor, Tensor] | None = None
        self.weight_OD = torch.cat([weight.float() for weight in group.weights])
        self.rows_ND = torch.cat([rows.float() for rows in group.rows_SND])
        self.target_NO = self.rows_ND @ self.weight_OD.T
        counts = [len(rows) for rows in group.rows_SND]
        self.state_N = torch.arange(2, device=self.rows_ND.device).repeat_interleave(
            torch.tensor(counts).to(self.rows_ND.device)
        )
        self.keep_SD = gate_channels(self.rows_ND.shape[1], *group.gate, self.rows_ND.device)
        sizes = [part.square().sum().clamp_min(1e-12) for part in self.target_NO.split(counts)]
        self.share_N1 = (1 / torch.stack(sizes))[self.state_N][:, None]

    def clip_weights(self, transform: Transform) -> None:
        if self.group.weight_format.quantizes:
            with torch.no_grad():
                self.clip = mse_clip(transform(self.weight_OD), self.group.weight_format, **COARSE)

    def keep(self, transform: Transform) -> None:
        """Let rows and rounded weights stay what this transform makes of them, where it does not learn."""
        if self.group.mse_clip:
            self.clip_weights(transform)
        with torch.no_grad():
            self.kept = self._mapped(transform)

    def __call__(self, transform: Transform, state_clip_S: Tensor | None) -> Tensor:
        x_ND, weight_OD = self._mapped(transform) if self.kept is None else self.kept
        if self.group.activation_format.quantizes:
            clip_N1 = None if state_clip_S is None else state_clip_S[self.state_N][:, None]
            x_ND = straight_through(x_ND, self.group.activation_format, clip_N1)
        loss: Tensor = ((x_ND @ weight_OD.T - self.target_NO).square() * self.share_N1).sum()
        return loss

    def _mapped(self, transform: Transform) -> tuple[Tensor, Tensor]:
        """Return the gated rows and the rounded weights."""
        group, x_ND, weight_OD = self.group, transform(self.rows_ND), transform(self.weight_OD)
        if group.gate != (0, 0):
            x_ND = x_ND * self.keep_SD[self.state_N]
        if group.weight_format.quantizes:
            weight_OD = straight_through(weight_OD, group.weight_format, self.clip)
        return x_ND, weight_OD


def output_errors(group: Group, transform: Transform, state_clip: Tensor | None) -> tuple[float, float]:
    """Return the relative squared error of the group's output, of masked and of other tokens, with real rounding."""
    weight_OD = torch.cat([weight.float() for weight in group.weights])
    mapped_OD = transform(weight_OD)
    searched = group.mse_clip and group.weight_format.quantizes
    clip = mse_clip(mapped_OD, group.weight_format, **COARSE) if searched else None
    mapped_OD = fake_quantize(mapped_OD, group.weight_format, clip=clip)
    errors = []
    for state, rows_ND in zip(TokenState, group.rows_SND, strict=True):
        target = rows_ND.float() @ weight_OD.T
        x_ND = gated(transform(rows_ND.float()), state, group.gate)
        ratio = None if state_clip is None else state_clip[state.axis].to(x_ND.device)
        x_ND = fake_quantize(x_ND, group.activation_format, clip=ratio)
        errors.append(float((x_ND @ mapped_OD.T - target).square().sum() / target.square().sum().clamp_min(1e-30)))
    return errors[0], errors[1]
