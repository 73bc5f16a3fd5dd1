"""Block-wise training: AdamW on the error of the block's output, with rounding passed straight through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starquant.calibration.walk import BlockVisit, Example
from starquant.config.bits import BitsSpec
from starquant.config.methods.flatquant import FlatQuantOptions
from starquant.errors import DataError
from starquant.methods.flatquant.parameters import BlockParameters
from starquant.methods.flatquant.simulated import simulated_block
from starquant.methods.products import products_as
from starquant.models.roles import SiteKey

#: Loss of squared errors [B, L], averaged over channels.
Loss = Callable[[Tensor, Example], Tensor]


def mean_over_tokens(error_BL: Tensor, example: Example) -> Tensor:
    """Return the mean squared error of all real tokens."""
    return error_BL[example.visible_BL].mean()


@dataclass
class _Epoch:
    """Squared errors and sizes of the outputs of a pass over the states."""

    error: float = 0.0
    size: float = 0.0

    @property
    def relative(self) -> float:
        """Error relative to the outputs' own size."""
        return self.error / max(self.size, 1e-30)


def train(
    visit: BlockVisit,
    learned: BlockParameters,
    bits: BitsSpec,
    options: FlatQuantOptions,
    gates: Mapping[SiteKey, nn.Module],
    loss_of: Loss = mean_over_tokens,
) -> tuple[float, float]:
    """Learn a block's parameters; returns its output's relative squared error over the first and the last pass.

    The target is what the block gives at full precision for what it is fed, the loss divided by its own value:
    gradients then have the same size in every block. States come in their own order in every pass (its authors').

    Args:
        visit: observed before, its block at full precision.
        learned: where everything starts; changed in place.
        bits: grids.
        options: steps and learning rates.
        gates: as `simulated_block`.
        loss_of: squared errors to a loss.

    Raises:
        DataError: what is learned is not finite.
    """
    rate = options.learning_rate
    block, epoch, passes = simulated_block(visit, learned, bits, gates), _Epoch(), []
    clips = {id(parameter): parameter for parameter in learned.clips()}
    transforms = [parameter for parameter in learned.parameters() if id(parameter) not in clips]
    groups = [{"params": transforms, "lr": rate}, {"params": [*clips.values()], "lr": options.clip_learning_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    steps = options.epochs * visit.count_examples(options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=rate * options.final_rate)
    where = f"learn transforms: block {visit.index}"
    with visit.progress.bar(None, where, "step", total=steps) as bar:
        for number in range(options.epochs):
            bar.set_description(f"{where}, epoch {number + 1} of {options.epochs}", refresh=False)
            epoch = _Epoch()
            for example in visit.examples(options.batch):
                with torch.enable_grad(), products_as(options.products, fewest_bits(bits)):
                    loss = _step(block, learned, example, loss_of, epoch, visit.name)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            passes.append(epoch.relative)
            visit.progress.tell_loss("block output", visit.index, number, options.epochs, lambda: passes[-1])
    return passes[0], passes[-1]


def _step(
    block: nn.Module, learned: BlockParameters, example: Example, loss_of: Loss, epoch: _Epoch, where: str
) -> Tensor:
    """Return the normalised loss of one batch, and add its errors to the pass's."""
    try:
        learned.renew()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise diverged(where) from None
    target_BLD = example.output_BLD.float()
    difference_BLD = block(example.hidden_BLD.float(), example.context) - target_BLD
    error_BL = difference_BLD.square().mean(-1)
    loss = loss_of(error_BL, example)
    if not bool(loss.isfinite()):
        raise diverged(where)
    epoch.error += float(error_BL.detach()[example.visible_BL].sum())
    epoch.size += float(target_BLD.square().mean(-1)[example.visible_BL].sum())
    return loss / loss.detach().clamp_min(1e-30)


def fewest_bits(bits: BitsSpec) -> int:
    """Return how many bits the coarsest of what a block rounds has; 16 where nothing is rounded."""
    operands = bits.attention
    return min(bits.weights.bits, bits.activations.bits, operands.q, operands.k, operands.p, operands.v)


def diverged(where: str) -> DataError:
    """Return the error of a training that ends in no numbers."""
    return DataError(f"{where}: what is learned is not finite; lower method.learning_rate or method.clip_learning_rate")
