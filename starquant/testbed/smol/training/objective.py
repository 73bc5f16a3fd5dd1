"""What training minimises: cross-entropy at masked positions, at a mask ratio drawn for every segment.

In most segments of tasks the answer alone is masked. A segment of n maskable positions weighs sqrt(n), whatever part of
it is masked; end tokens behind the first weigh a quarter.

Shape suffixes: B rows, L tokens of a row, S segment numbers of a row, N predicted positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from starquant.testbed.smol.training.network import Network
from starquant.testbed.smol.training.packing import MOST_SEGMENTS, Mark, Rows

ANSWER_ONLY = 0.7  # share of task segments that are masked in the answer only
LEAST_MASKED = 0.02
END_WEIGHT = 0.25
#: Share of positions that the head is computed at, one number so that shapes never change.
PREDICTED = 0.42


@dataclass(frozen=True)
class Batch:
    """Rows with their masks.

    Attributes:
        masked_BL: True where a token is masked, never in a segment's first place, which nothing predicts.
        predicted_N: masked positions as places among all B * L tokens; others behind them where there are fewer, some
            left out at random where there are more.
        weight_N: of each in the loss; 0 for those that are not masked.
        natural_N: True where the position is masked and of natural text.
        answer_N: True where it is masked and of an answer, its first end token included.
    """

    ids_BL: Tensor
    position_BL: Tensor
    segment_BL: Tensor
    masked_BL: Tensor
    predicted_N: Tensor
    weight_N: Tensor
    natural_N: Tensor
    answer_N: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the same on a device."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def draw_masks(rows: Rows, generator: torch.Generator) -> Batch:
    """Mask rows; the generator is the CPU's, so that masks are the same for every device."""
    segment_BL, mark_BL = rows.segment_BL.long(), rows.mark_BL.long()
    of_task_BS = _sum_by_segment(mark_BL > 0, segment_BL) > 0
    answer_only_BS = of_task_BS & (torch.rand(of_task_BS.shape, generator=generator) < ANSWER_ONLY)
    maskable_BL = (segment_BL > 0) & (rows.position_BL > 0)
    maskable_BL &= ~answer_only_BS.gather(1, segment_BL) | (mark_BL > 0)
    ratio_BS = LEAST_MASKED + (1 - LEAST_MASKED) * torch.rand(of_task_BS.shape, generator=generator)
    masked_BL = maskable_BL & (torch.rand(segment_BL.shape, generator=generator) < ratio_BS.gather(1, segment_BL))
    masked_BS, maskable_BS = (_sum_by_segment(where, segment_BL) for where in (masked_BL, maskable_BL))
    weight_BL = (maskable_BS.sqrt() / masked_BS.clamp_min(1)).gather(1, segment_BL) * masked_BL
    weight_BL = torch.where(mark_BL == Mark.END, END_WEIGHT, 1.0) * weight_BL
    order = masked_BL.flatten() + torch.rand(masked_BL.numel(), generator=generator) / 2
    predicted_N = order.topk(predicted_positions(masked_BL.numel())).indices.sort().values
    natural_BL = masked_BL & ~of_task_BS.gather(1, segment_BL)
    answer_BL = masked_BL & (mark_BL == Mark.ANSWER)
    at = (x.flatten()[predicted_N] for x in (weight_BL, natural_BL, answer_BL))
    return Batch(rows.ids_BL.long(), rows.position_BL.long(), segment_BL, masked_BL, predicted_N, *at)


def _sum_by_segment(x_BL: Tensor, segment_BL: Tensor) -> Tensor:
    """Sum over each segment of a row, [B, S]; number 0 is padding's."""
    return torch.zeros(len(x_BL), MOST_SEGMENTS + 1).scatter_add_(1, segment_BL, x_BL.float())


def predicted_positions(tokens: int) -> int:
    """Return at how many of a batch's positions the head is computed."""
    return min(tokens, 64 * max(1, int(tokens * PREDICTED) // 64))


def cross_entropy(network: Network, batch: Batch) -> Tensor:
    """Return the cross-entropy of the batch's predicted positions, [N]."""
    hidden_BLD = network(batch.ids_BL, batch.position_BL, batch.segment_BL, batch.masked_BL)
    before_N = (batch.predicted_N - 1).clamp_min(0)
    logits_NV = network.logits(hidden_BLD.flatten(0, 1).index_select(0, before_N))
    return F.cross_entropy(logits_NV, batch.ids_BL.flatten()[batch.predicted_N], reduction="none")


def weighted_mean(loss_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return the mean of losses; 0 where nothing has a weight."""
    return (loss_N * weight_N).sum() / weight_N.sum().clamp_min(1e-9)
