"""What sources and state samplers produce and the calibration engine consumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import Context
from starquant.numerics.token_states import ratio_bins


@dataclass(frozen=True)
class Segment:
    """A run of tokens; those from `prompt_length` on may be masked.

    Attributes:
        ids: token ids.
        prompt_length: leading tokens that always stay visible; 0 for plain text.
        text: what the ids were made of, for the check against evaluation items.
        group: of segments that fidelity is also given for: "text", "tasks"; empty for none.
    """

    ids: tuple[int, ...]
    prompt_length: int
    text: str
    group: str = ""


@dataclass(frozen=True)
class StateBatch:
    """Partly masked sequences, on the CPU.

    Attributes:
        ids_BL: token ids, [MASK] where masked.
        visible_BL: False on padding.
        ratio_B: mask ratio of each row in float64: masked share of its maskable tokens.
        weight_BL: weight of each token in second moments (CGQ), None for one.
        position_BL: of every token, None for the running count: in block diffusion's layout [noisy ; clean] the clean
            half counts anew.
    """

    ids_BL: Tensor
    visible_BL: Tensor
    ratio_B: Tensor
    weight_BL: Tensor | None = None
    position_BL: Tensor | None = None

    def of_rows(self, rows: slice) -> StateBatch:
        """Return some rows."""
        weight_BL, position_BL = (None if x is None else x[rows] for x in (self.weight_BL, self.position_BL))
        return StateBatch(self.ids_BL[rows], self.visible_BL[rows], self.ratio_B[rows], weight_BL, position_BL)

    def real_tokens(self, device: torch.device) -> Tensor | None:
        """Return where tokens are no padding, on a device; None where none is."""
        return None if bool(self.visible_BL.all()) else self.visible_BL.to(device)

    def context(self, model: MaskedDiffusionModel) -> Context:
        """Return what a model's blocks share in a pass over the batch, on its device."""
        visible_BL = self.real_tokens(model.device)
        position_BL = None if self.position_BL is None else self.position_BL.to(model.device)
        return model.context(self.ids_BL.to(model.device), visible_BL, position_BL)


@dataclass(frozen=True)
class CalibrationStates:
    """All states of one calibration.

    Attributes:
        batches: the states, a batch at a time.
        mask_id: id of [MASK].
        bins: equally wide mask-ratio bins; bin k holds ratios in (k/bins, (k+1)/bins], bin 0 also 0.
        inputs: what a walk feeds each block: output of the "full_precision" blocks before it, of those
            with "quantized_weights", or of the "quantized".
        report: plain data for the record: source, digest, counts of states and tokens a bin.
        least_tokens: of each token state, that an expert's own statistics are made of at least.
        rare_experts: what is done below that, "pooled" or "round" (`config.calibration.ExpertsSpec`).
    """

    batches: Sequence[StateBatch]
    mask_id: int
    bins: int = 1
    inputs: str = "full_precision"
    report: dict[str, Any] = field(default_factory=dict)
    least_tokens: int = 16
    rare_experts: str = "pooled"

    def tokens(self, model: MaskedDiffusionModel) -> list[int]:
        """Return the number of visible tokens of each token state, on the model's axis of states."""
        counts_S = torch.zeros(len(model.states), dtype=torch.long)
        for batch in self.batches:
            state_BL = model.token_states(batch.ids_BL, batch.visible_BL, batch.position_BL)
            counts_S += torch.bincount(state_BL[batch.visible_BL], minlength=len(counts_S))
        counted: list[int] = counts_S.tolist()
        return counted


def bin_of(ratio_B: Tensor, bins: int) -> Tensor:
    """Return the mask-ratio bin of each ratio: (k/bins, (k+1)/bins] is bin k, and 0 is in bin 0."""
    return ratio_bins(ratio_B.double(), bins)


def padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids [B, L], padded on the right, and where they are no padding, [B, L]."""
    width = max(map(len, rows))
    ids_BL = torch.full((len(rows), width), pad, dtype=torch.long)
    visible_BL = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids_BL[i, : len(row)] = row
        visible_BL[i, : len(row)] = True
    return ids_BL, visible_BL


def padded_states(
    ids: Sequence[Tensor], positions: Sequence[Tensor | None], pad: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `padded` ids, where they are no padding, and positions, [B, L]; None where those of every row count up."""
    ids_BL, visible_BL = padded(ids, pad)
    if all(at_L is None for at_L in positions):
        return ids_BL, visible_BL, None
    counting = [torch.arange(len(row_L)) if at_L is None else at_L for row_L, at_L in zip(ids, positions, strict=True)]
    return ids_BL, visible_BL, padded(counting, 0)[0]
