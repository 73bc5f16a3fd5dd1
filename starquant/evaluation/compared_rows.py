"""Two models' predictions at masked positions, row by row, and what a comparison leaves.

Shape suffixes: N measured positions, D model width, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.errors import CheckpointError
from starquant.evaluation.reference import Head
from starquant.evaluation.trajectory_metrics import compare_logits, mean_by_row, relative_error
from starquant.models.base import MaskedDiffusionModel
from starquant.store.items import FIDELITY
from starquant.store.record import Score

_CHUNK = 2**24  # logits that are compared at a time


@dataclass(frozen=True)
class Fidelity:
    """Scores, and one row a state; of trajectories, a prompt's last row (step None) is its free-running answer's."""

    scores: list[Score]
    items: list[dict[str, Any]]

    @property
    def by_group(self) -> dict[str, list[dict[str, Any]]]:
        """Rows under the name they are kept by: all of them, and those of each group of texts."""
        groups = sorted({row["group"] for row in self.items if "group" in row})
        own = {f"{FIDELITY}_{group}": [row for row in self.items if row["group"] == group] for group in groups}
        return {FIDELITY: self.items} | own


def compare_rows(
    head: Head,
    model: MaskedDiffusionModel,
    full_ND: Tensor,
    residual_ND: Tensor,
    normed_ND: Tensor,
    rows_N: Tensor,
    size: int,
) -> dict[str, Tensor]:
    """Return each row's mean of every metric of the predictions, and its hidden_mse, [R] on the CPU.

    Args:
        head: full precision's.
        model: that is compared.
        full_ND: full precision's residual stream.
        residual_ND: the model's, in the checkpoint's basis.
        normed_ND: the same after the model's last norm.
        rows_N: the row of each position.
        size: number of rows.
    """
    chunk = max(1, _CHUNK // len(head.weight_VD))
    parts = []
    for full, normed in zip(full_ND.split(chunk), normed_ND.split(chunk), strict=True):
        parts.append(compare_logits(head.logits(full), model.project(normed)))
    metrics = {metric: mean_by_row(torch.cat([p[metric] for p in parts]), rows_N, size) for metric in parts[0]}
    metrics["hidden_mse"] = relative_error(full_ND, residual_ND, rows_N, size)
    return {metric: value_R.cpu() for metric, value_R in metrics.items()}


def compare_predictions(head: Head, full_ND: Tensor, logits_NV: Tensor, rows_N: Tensor, size: int) -> dict[str, Tensor]:
    """Return the same of logits [N, V] that another engine gave, which has no hidden states to compare."""
    parts = compare_logits(head.logits(full_ND), logits_NV)
    return {metric: mean_by_row(value_N, rows_N, size).cpu() for metric, value_N in parts.items()}


def finite(value: Tensor, metric: str, row: dict[str, Any]) -> float:
    """Return a number; raises CheckpointError when it is none."""
    if not bool(torch.isfinite(value)):
        raise CheckpointError(f"fidelity: {metric} of prompt {row['prompt']} at step {row['step']} is not finite")
    return float(value)
