"""What sources and state samplers produce and the calibration engine consumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

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
    """

    ids_BL: Tensor
    visible_BL: Tensor
    ratio_B: Tensor
    weight_BL: Tensor | None = None


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

    def tokens(self) -> list[int]:
        """Return the number of visible tokens of each token state, on the axis of `numerics.TokenState`."""
        masked = sum(int(((b.ids_BL == self.mask_id) & b.visible_BL).sum()) for b in self.batches)
        return [masked, sum(int(b.visible_BL.sum()) for b in self.batches) - masked]


def bin_of(ratio_B: Tensor, bins: int) -> Tensor:
    """Return the mask-ratio bin of each ratio: (k/bins, (k+1)/bins] is bin k, and 0 is in bin 0."""
    return ratio_bins(ratio_B.double(), bins)
