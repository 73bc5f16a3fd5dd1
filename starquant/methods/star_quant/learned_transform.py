"""The base transform P of STaR-Quant, learned through straight-through rounding on the error of a group's output.

Every step sees other tokens (`batch` of each state), drawn without replacement until all have been seen. Products may
be bfloat16's: what they lose is far below what a 4-bit grid does, and P is composed and judged without them.

Shapes: as in `base_transform`; n rows of a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.config.methods.star_quant import TransformOptions
from starquant.errors import DataError
from starquant.methods.products import products_as
from starquant.methods.star_quant.base_transform import COARSE, Group, Learned, Transform
from starquant.numerics import cayley, gate_channels, mse_clip, straight_through
from starquant.numerics.token_states import group_indices
from starquant.session.progress import SILENT, Progress

CLIP_LOGIT = 4.0  # clip ratios start at its sigmoid, 0.98


@dataclass(frozen=True)
class Watch:
    """Who sees a transform being learned, and where it stands.

    Attributes:
        progress: draws a bar over the steps, and tells the loss.
        site: of the transform.
        block: its index; None for all blocks.
    """

    progress: Progress = SILENT
    site: str = "site"
    block: int | None = None

    def steps(self, count: int) -> Iterator[int]:
        """Return the steps, under a bar."""
        where = self.site if self.block is None else f"block {self.block}, {self.site}"
        return iter(self.progress.bar(range(count), f"learn transform: {where}", "step"))

    def loss(self, step: int, steps: int, loss: Tensor) -> None:
        """Tell the loss of a step."""
        self.progress.tell_loss(self.site, self.block, step, steps, lambda: float(loss.detach()))


UNWATCHED = Watch()


class _Free:
    """What is learned: Cayley parameters of each factor, clip ratios of the token states."""

    def __init__(self, start: Transform, group: Group, options: TransformOptions, rotate: bool) -> None:
        device = group.weights[0].device
        self.start, self.rotate = start.to(torch.empty(0, dtype=torch.float64, device=device)), rotate
        self.free = [torch.zeros_like(f, dtype=torch.float32, requires_grad=rotate) for f in self.start.factors]
        clips = options.state_clip and group.activation_format.quantizes
        self.logits_S = torch.full((len(group.states),), CLIP_LOGIT, device=device, requires_grad=clips)

    def groups(self, options: TransformOptions) -> list[dict[str, Any]]:
        """Return the tensors that learn, with their learning rates."""
        rates = [options.learning_rate] * len(self.free) + [options.clip_learning_rate]
        tensors = [*self.free, self.logits_S]
        return [{"params": [t], "lr": rate} for t, rate in zip(tensors, rates, strict=True) if t.requires_grad]

    def rotation(self) -> Transform:
        """Return what stands behind the start as it is, differentiable; nothing where P does not learn."""
        return Transform([cayley(free) for free in self.free] if self.rotate else [])

    def state_clip(self) -> Tensor | None:
        """Return the clip ratios, differentiable."""
        return self.logits_S.sigmoid() if self.logits_S.requires_grad else None

    def result(self) -> Learned:
        """Return what was learned, P composed in float64."""
        rotations = [cayley(free.detach().double()) for free in self.free]
        transform, clip = self.start.turned(rotations) if self.rotate else self.start, self.state_clip()
        return Learned(transform.to(self.logits_S.float()), None if clip is None else clip.detach())


def _fewest_bits(group: Group) -> int:
    return min(group.weight_format.bits, group.activation_format.bits)


def learn(
    group: Group, start: Transform, options: TransformOptions, rotate: bool = True, watch: Watch = UNWATCHED
) -> Learned:
    """Learn P = start x Cayley by Adam on the error of the group's output, through straight-through rounding.

    The error is the sum over token states of |x W^T - Q(x P G_s) Q(W P^-T)^T|^2 / |x W^T|^2 (STaR-Quant's objective,
    each state relative to its own size: our choice). Gates act while P is learned, so that both adapt (FreeAct).

    Args:
        group: linears and rows.
        start: in float64.
        options: how it is learned.
        rotate: learn P; else only the clip ratios.
        watch: sees the steps.

    Raises:
        DataError: what was learned is not finite.
    """
    loss_of = _Loss(group, options.batch, start)
    with torch.enable_grad(), products_as(options.products, _fewest_bits(group)):
        free = _Free(start, group, options, rotate)
        optimizer = torch.optim.Adam(free.groups(options))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        if not rotate:
            loss_of.keep(free.rotation())
        for step in watch.steps(options.steps):
            rotation = free.rotation()
            if rotate and group.mse_clip and step % options.clip_every == 0:
                loss_of.clip_weights(rotation)
            loss = loss_of(rotation, free.state_clip())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            watch.loss(step, options.steps, loss)
    learned = free.result()
    if not all(bool(torch.isfinite(factor).all()) for factor in learned.transform.factors):
        raise DataError("the learned transform is not finite")
    return learned


def learn_shared(groups: Sequence[Group], options: TransformOptions, watch: Watch = UNWATCHED) -> Tensor:
    """Learn one dense P for all groups, from the identity; returns it in float64.

    There are `options.steps` rounds over the groups, one group a step.

    Raises:
        DataError: what is learned is not finite.
        torch.linalg.LinAlgError: on the way, P could not be solved for.
    """
    weight_OD = groups[0].weights[0]
    width, device = weight_OD.shape[1], weight_OD.device
    losses = [_Loss(group, options.batch, Transform([])) for group in groups]
    with torch.enable_grad(), products_as(options.products, _fewest_bits(groups[0])):
        free_DD = torch.zeros(width, width, dtype=torch.float32, device=device, requires_grad=True)
        shape = (len(groups), len(groups[0].states))
        logits_GS = torch.full(shape, CLIP_LOGIT, device=device, requires_grad=options.state_clip)
        learning: list[dict[str, Any]] = [{"params": [free_DD]}]
        if options.state_clip:
            learning.append({"params": [logits_GS], "lr": options.clip_learning_rate})
        optimizer = torch.optim.Adam(learning, lr=options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps * len(groups))
        for step in watch.steps(options.steps):
            total = torch.zeros((), device=device)
            for index, loss_of in enumerate(losses):
                transform = Transform([cayley(free_DD)])
                if loss_of.group.mse_clip and step % options.clip_every == 0:
                    loss_of.clip_weights(transform)
                loss = loss_of(transform, logits_GS[index].sigmoid() if options.state_clip else None)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
            watch.loss(step, options.steps, total / len(losses))
    learned_DD = cayley(free_DD.detach().double())
    if not bool(torch.isfinite(learned_DD).all()):
        raise DataError("the learned transform is not finite")
    return learned_DD


class _Batches:
    """Rows of each state, `batch` a time, in a new order whenever all of a state have been drawn."""

    def __init__(self, counts: Sequence[int], batch: int, device: torch.device) -> None:
        self.sizes, self.device = [min(count, batch) for count in counts], device
        self.counts, self.firsts = counts, [0, *itertools.accumulate(counts[:-1])]
        self.waiting = [torch.empty(0, dtype=torch.long) for _ in counts]
        self.generator = torch.Generator().manual_seed(0)

    def draw(self) -> Tensor:
        """Return the positions of the next rows."""
        drawn = []
        for state, size in enumerate(self.sizes):
            if len(self.waiting[state]) < size:
                self.waiting[state] = torch.randperm(self.counts[state], generator=self.generator)
            drawn.append(self.firsts[state] + self.waiting[state][:size])
            self.waiting[state] = self.waiting[state][size:]
        return torch.cat(drawn).to(self.device)


class _Loss:
    """The error of a group's output as a function of P, with weight clip ratios that are searched now and then.

    Rows and weights are held behind the transform that P starts from: a step multiplies by what is learned alone.
    """

    def __init__(self, group: Group, batch: int, start: Transform) -> None:
        self.group = group
        self.clip: Tensor | None = None
        self.kept: tuple[Tensor, Tensor] | None = None
        weight_OD, rows_ND = (torch.cat([x.float() for x in of]) for of in (group.weights, group.rows_SND))
        self.target_NO = rows_ND @ weight_OD.T
        with torch.no_grad():
            start = start.to(rows_ND)
            self.weight_OD, self.rows_ND = start.of_weight(weight_OD), start(rows_ND)
        device, counts = self.rows_ND.device, [len(rows) for rows in group.rows_SND]
        self.state_N = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
        self.keep_GD = gate_channels(self.rows_ND.shape[1], *group.gate, device)
        self.batches = _Batches(counts, batch, device)
        sizes = torch.stack([part.square().sum().clamp_min(1e-12) for part in self.target_NO.split(counts)])
        steps_S = torch.tensor(counts, device=device) / torch.tensor(self.batches.sizes, device=device).clamp_min(1)
        self.share_N1 = (steps_S / sizes)[self.state_N][:, None]  # a state's batches make up its whole

    def clip_weights(self, transform: Transform) -> None:
        if self.group.weight_format.quantizes:
            with torch.no_grad():
                self.clip = mse_clip(transform.of_weight(self.weight_OD), self.group.weight_format, **COARSE)

    def keep(self, transform: Transform) -> None:
        """Let rows and rounded weights stay what this transform makes of them, where it does not learn."""
        if self.group.mse_clip:
            self.clip_weights(transform)
        with torch.no_grad():
            self.kept = transform(self.rows_ND), self._rounded(transform)

    def __call__(self, transform: Transform, state_clip_S: Tensor | None) -> Tensor:
        rows_n = self.batches.draw()
        state_n = self.state_N[rows_n]
        if self.kept is None:
            x_nD, weight_OD = transform(self.rows_ND[rows_n]), self._rounded(transform)
        else:
            x_nD, weight_OD = self.kept[0][rows_n], self.kept[1]
        if self.group.gate != (0, 0):
            x_nD = x_nD * self.keep_GD[group_indices(state_n)]
        if self.group.activation_format.quantizes:
            clip_n1 = None if state_clip_S is None else state_clip_S[state_n][:, None]
            x_nD = straight_through(x_nD, self.group.activation_format, clip_n1)
        error_nO = x_nD @ weight_OD.T - self.target_NO[rows_n]
        loss: Tensor = (error_nO.square() * self.share_N1[rows_n]).sum()
        return loss

    def _rounded(self, transform: Transform) -> Tensor:
        weight_OD, fmt = transform.of_weight(self.weight_OD), self.group.weight_format
        return straight_through(weight_OD, fmt, self.clip) if fmt.quantizes else weight_OD
