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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from starquant.config.fields import Count, Spec
from starquant.errors import DataError
from starquant.session.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from starquant.numerics import QuantFormat

Positive = Annotated[float, Field(gt=0.0)]
CLIP_LOGIT = 4.0  # clip ratios start at its sigmoid, 0.98
COARSE: Any = {"grid": 20, "max_shrink": 0.5}  # search of weight clips while P is learned and judged


class TransformOptions(Spec):
    """How P is found.

    Attributes:
        fit: "fixed" keeps QuaRot's rotation; "closed_form" takes the gated directions from the second moments of
            masked and unmasked tokens; "learned" minimises the error of the group's output.
        structure: of what is learned; "auto" is dense up to `dense_width` channels and Kronecker beyond.
        dense_width: of "auto".
        rows: tokens of each state that it is learned on, and as many it is judged on.
        steps: of Adam.
        learning_rate: at the start; a cosine brings it to zero.
        state_clip: learn how much of each token's range the grid covers, one ratio a token state.
        clip_every: steps between two searches of the weights' clip ratios, where weights are clipped.
    """

    fit: Literal["fixed", "closed_form", "learned"] = "learned"
    structure: Literal["auto", "dense", "kronecker", "shared"] = "auto"
    dense_width: Count = 1024
    rows: Count = 256
    steps: Count = 160
    learning_rate: Positive = 0.02
    state_clip: bool = True
    clip_every: Count = 20

    def structure_of(self, width: int) -> str:
        """Return "dense" or "kronecker" for a site with a matrix of its own."""
        if self.structure in ("dense", "kronecker"):
            return self.structure
        return "dense" if width <= self.dense_width else "kronecker"


@dataclass(frozen=True)
class Group:
    """What a transform is learned for: the linears of one site and rows of what they read.

    Attributes:
        weights: of each linear, [O, D].
        rows_SND: rows of masked and of other tokens, [N_s, D] each.
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


@dataclass(frozen=True)
class Transform:
    """An orthogonal P of one factor (dense), two (Kronecker), or none (the identity); x becomes x P on both sides."""

    factors: Sequence[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Return x P."""
        from starquant.numerics import apply_kronecker

        if len(self.factors) == 2:
            return apply_kronecker(x, *self.factors)
        return x @ self.factors[0] if self.factors else x

    def to(self, like: Tensor) -> Transform:
        """Return it in the dtype and on the device of a tensor."""
        return Transform([factor.to(like) for factor in self.factors])


@dataclass(frozen=True)
class Learned:
    """A transform in float32 and the clip ratios [2] of masked and of other tokens."""

    transform: Transform
    state_clip: Tensor | None


def gated(x_ND: Tensor, state: int, gate: tuple[int, int]) -> Tensor:
    """Return rows of one state (0 masked, 1 other) with the other state's channels at zero: [shared | d_m | d_u]."""
    import torch

    masked, unmasked = gate
    shared = x_ND.shape[1] - masked - unmasked
    keep_D = torch.ones(x_ND.shape[1], dtype=x_ND.dtype, device=x_ND.device)
    if state == 0:
        keep_D[shared + masked :] = 0
    else:
        keep_D[shared : shared + masked] = 0
    return x_ND * keep_D


class _Free:
    """What is learned: Cayley parameters of each factor, clip ratios of both token states."""

    def __init__(self, start: Sequence[Tensor], group: Group, options: TransformOptions, rotate: bool) -> None:
        import torch

        device = group.weights[0].device
        self.start, self.rotate = [factor.to(device) for factor in start], rotate
        self.free = [torch.zeros_like(factor, dtype=torch.float32, requires_grad=rotate) for factor in self.start]
        clips = options.state_clip and group.activation_format.quantizes
        self.logits_S = torch.full((2,), CLIP_LOGIT, device=device, requires_grad=clips)

    def parameters(self) -> list[Tensor]:
        """Return the tensors that learn."""
        return [tensor for tensor in (*self.free, self.logits_S) if tensor.requires_grad]

    def transform(self) -> Transform:
        """Return the transform as it stands, differentiable."""
        from starquant.numerics import cayley

        pairs = zip(self.start, self.free, strict=True)
        return Transform([s.float() @ cayley(f) if self.rotate else s.float() for s, f in pairs])

    def state_clip(self) -> Tensor | None:
        """Return the clip ratios, differentiable."""
        return self.logits_S.sigmoid() if self.logits_S.requires_grad else None

    def result(self) -> Learned:
        """Return what was learned, P composed in float64."""
        from starquant.numerics import cayley

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
    import torch

    with torch.enable_grad():
        free = _Free(start, group, options, rotate)
        optimizer = torch.optim.Adam(free.parameters(), lr=options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        loss_of = _Loss(group)
        for step in range(options.steps):
            transform = free.transform()
            if group.mse_clip and step % options.clip_every == 0:
                loss_of.clip_weights(transform)
            loss = loss_of(transform, free.state_clip())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    found = free.result()
    if not all(bool(torch.isfinite(factor).all()) for factor in found.transform.factors):
        raise DataError("the learned transform is not finite")
    return found


def learn_shared(
    groups: Sequence[Group], start_DD: Tensor, options: TransformOptions, progress: Progress = SILENT
) -> Tensor:
    """Learn one dense P for all groups: `options.steps` rounds over them, one group a step; returns it in float64."""
    import torch

    from starquant.numerics import cayley

    with torch.enable_grad():
        start_DD = start_DD.to(groups[0].weights[0].device)
        free_DD = torch.zeros_like(start_DD, dtype=torch.float32, requires_grad=True)
        logits_GS = torch.full((len(groups), 2), CLIP_LOGIT, device=start_DD.device, requires_grad=options.state_clip)
        optimizer = torch.optim.Adam([free_DD, *([logits_GS] if options.state_clip else [])], lr=options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps * len(groups))
        losses = [_Loss(group) for group in groups]
        for step in progress.bar(range(options.steps), "shared transform", "step"):
            for index, loss_of in enumerate(losses):
                transform = Transform([start_DD.float() @ cayley(free_DD)])
                if loss_of.group.mse_clip and step % options.clip_every == 0:
                    loss_of.clip_weights(transform)
                loss = loss_of(transform, logits_GS[index].sigmoid() if options.state_clip else None)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return start_DD @ cayley(free_DD.detach().double())


class _Loss:
    """The error of a group's output as a function of P, with weight clip ratios that are searched now and then."""

    def __init__(self, group: Group) -> None:
        import torch

        self.group, self.clip = group, None
        self.weight_OD = torch.cat([weight.float() for weight in group.weights])
        self.rows_ND = torch.cat([rows.float() for rows in group.rows_SND])
        self.target_NO = self.rows_ND @ self.weight_OD.T
        counts = [len(rows) for rows in group.rows_SND]
        self.state_N = torch.arange(2, device=self.rows_ND.device).repeat_interleave(
            torch.tensor(counts).to(self.rows_ND.device)
        )
        ones = [torch.ones_like(rows[:1], dtype=torch.float32) for rows in group.rows_SND]
        self.keep_SD = torch.cat([gated(one, state, group.gate) for state, one in enumerate(ones)])
        sizes = [part.square().sum().clamp_min(1e-12) for part in self.target_NO.split(counts)]
        self.share_N1 = (1 / torch.stack(sizes))[self.state_N][:, None]

    def clip_weights(self, transform: Transform) -> None:
        import torch

        from starquant.numerics import mse_clip

        if self.group.weight_format.quantizes:
            with torch.no_grad():
                self.clip = mse_clip(transform(self.weight_OD), self.group.weight_format, **COARSE)

    def __call__(self, transform: Transform, state_clip_S: Tensor | None) -> Tensor:
        from starquant.numerics import straight_through

        group, x_ND, weight_OD = self.group, transform(self.rows_ND), transform(self.weight_OD)
        if group.gate != (0, 0):
            x_ND = x_ND * self.keep_SD[self.state_N]
        if group.weight_format.quantizes:
            weight_OD = straight_through(weight_OD, group.weight_format, self.clip)
        if group.activation_format.quantizes:
            clip_N1 = None if state_clip_S is None else state_clip_S[self.state_N][:, None]
            x_ND = straight_through(x_ND, group.activation_format, clip_N1)
        loss: Tensor = ((x_ND @ weight_OD.T - self.target_NO).square() * self.share_N1).sum()
        return loss


def output_errors(group: Group, transform: Transform, state_clip: Tensor | None) -> tuple[float, float]:
    """Return the relative squared error of the group's output, of masked and of other tokens, with real rounding."""
    import torch

    from starquant.numerics import fake_quantize, mse_clip

    weight_OD = torch.cat([weight.float() for weight in group.weights])
    mapped_OD = transform(weight_OD)
    searched = group.mse_clip and group.weight_format.quantizes
    clip = mse_clip(mapped_OD, group.weight_format, **COARSE) if searched else None
    mapped_OD = fake_quantize(mapped_OD, group.weight_format, clip=clip)
    errors = []
    for state, rows_ND in enumerate(group.rows_SND):
        target = rows_ND.float() @ weight_OD.T
        x_ND = gated(transform(rows_ND.float()), state, group.gate)
        ratio = None if state_clip is None else state_clip[state].to(x_ND.device)
        x_ND = fake_quantize(x_ND, group.activation_format, clip=ratio)
        errors.append(float((x_ND @ mapped_OD.T - target).square().sum() / target.square().sum().clamp_min(1e-30)))
    return errors[0], errors[1]
