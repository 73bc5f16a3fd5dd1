"""What is measured on one denoising state, and how states become scores.

Shape suffixes: N measured positions, V vocabulary, D model width, B batch, G answer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from starquant.statistics.bootstrap import bootstrap
from starquant.store.items import FIDELITY
from starquant.store.record import Score

#: Raised whenever a metric's definition changes.
TASK_VERSION = "1"

Unit = Literal["fraction", "nats", "relative"]
#: Metric -> (higher is better, unit). A bias has no better side.
METRICS: dict[str, tuple[bool | None, Unit]] = {
    "top1_agreement": (True, "fraction"),
    "kl": (False, "nats"),
    "confidence_drift": (False, "fraction"),
    "confidence_bias": (None, "fraction"),
    "hidden_mse": (False, "relative"),
    "commit_flips": (False, "fraction"),
    "answer_flips": (False, "fraction"),
    "same_answer": (True, "fraction"),
}


def committed(before_BG: Tensor, after_BG: Tensor, mask_id: int) -> Tensor:
    """Return where a step put a token in place of a mask, [B, G]."""
    return (before_BG == mask_id) & (after_BG != mask_id)


def measured_positions(
    before_BG: Tensor, after_BG: Tensor, mask_id: int, most: int, reach_BG: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (rows [N], answer columns [N]) of the masked positions that a step's metrics are taken at.

    Rows in which the step commits nothing are left out: they wait for others, or replace tokens only. Of more than
    `most` masked positions, `most` evenly spaced ones stand for all. `reach_BG` is where the step predicts, None for
    everywhere.
    """
    rows, columns = [], []
    for row in committed(before_BG, after_BG, mask_id).any(1).nonzero()[:, 0].tolist():
        masked_G = before_BG[row] == mask_id
        masked = (masked_G if reach_BG is None else masked_G & reach_BG[row]).nonzero()[:, 0]
        masked = evenly(masked, most)
        rows.append(torch.full_like(masked, row))
        columns.append(masked)
    empty = before_BG.new_empty(0, dtype=torch.long)
    return torch.cat((empty, *rows)), torch.cat((empty, *columns))


def evenly(positions_N: Tensor, most: int) -> Tensor:
    """Return the positions, or of more than `most` that many evenly spaced ones."""
    count = len(positions_N)
    if count <= most:
        return positions_N
    return positions_N[(2 * torch.arange(most, device=positions_N.device) + 1) * count // (2 * most)]


def compare_logits(full_NV: Tensor, other_NV: Tensor) -> dict[str, Tensor]:
    """Compare two models' predictions at N positions; every value is float64 [N].

    Returns:
        top1_agreement: 1 where the most likely tokens are the same.
        kl: KL(full || other) in nats, from float32 log-softmaxes and summed in float64.
        confidence_bias: p_other(t) - p_full(t) for full precision's most likely token t.
        confidence_drift: its absolute value.
    """
    log_full, log_other = full_NV.float().log_softmax(1).double(), other_NV.float().log_softmax(1).double()
    top_N = full_NV.argmax(1)
    bias_N = (log_other.gather(1, top_N[:, None]).exp() - log_full.gather(1, top_N[:, None]).exp())[:, 0]
    return {
        "top1_agreement": (other_NV.argmax(1) == top_N).double(),
        "kl": (log_full.exp() * (log_full - log_other)).sum(1),
        "confidence_drift": bias_N.abs(),
        "confidence_bias": bias_N,
    }


def mean_by_row(value_N: Tensor, rows_N: Tensor, size: int) -> Tensor:
    """Return the mean of each row's positions, float64 [size]; zero for rows that have none."""
    return _sum_by_row(value_N, rows_N, size) / torch.bincount(rows_N, minlength=size).clamp_min(1)


def relative_error(full_ND: Tensor, other_ND: Tensor, rows_N: Tensor, size: int) -> Tensor:
    """Return sum ||other - full||^2 / sum ||full||^2 over each row's positions, float64 [size]."""
    full, other = full_ND.double(), other_ND.double()
    error = _sum_by_row((other - full).square().sum(1), rows_N, size)
    power = _sum_by_row(full.square().sum(1), rows_N, size)
    return error / power.clamp_min(torch.finfo(torch.float64).tiny)


def commit_flips(before_BG: Tensor, full_BG: Tensor, other_BG: Tensor, mask_id: int) -> Tensor:
    """Return 1 - |F and O| / |F| for the (position, token) pairs F and O that two models commit, float64 [B].

    Rows in which full precision commits nothing get 0. Tokens that take another's place are not counted.
    """
    committed_BG = committed(before_BG, full_BG, mask_id)
    kept_B = (committed_BG & (other_BG == full_BG)).sum(1).double()
    count_B = committed_BG.sum(1)
    return torch.where(count_B > 0, 1 - kept_B / count_B.clamp_min(1), 0.0)


def _sum_by_row(value_N: Tensor, rows_N: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=value_N.device).index_add(0, rows_N, value_N.double())


def summarize(
    items: Sequence[dict[str, Any]], bins: int, resamples: int, seed: int, task: str = FIDELITY
) -> list[Score]:
    """Return the scores of all items, overall (filter "all") and by mask-ratio bin.

    A state's value is the mean over its positions, a prompt's the mean over its states, the score the mean over
    prompts: every state of a prompt counts alike, and so does every prompt. Prompts are what is resampled.
    """
    chosen: dict[str, list[dict[str, Any]]] = {"all": list(items)}
    for k in range(bins):
        rows = [row for row in items if row["mask_ratio"] is not None and _bin(row["mask_ratio"], bins) == k]
        chosen[bin_name(k, bins)] = rows
    scores = [_score(task, rows, metric, name, resamples, seed) for name, rows in chosen.items() for metric in METRICS]
    return [score for score in scores if score is not None]


def bin_name(k: int, bins: int) -> str:
    """Return the filter name of bin k, mask ratios in (k/bins, (k+1)/bins]."""
    digits = max(2, len(str(bins)))
    return f"mask_ratio_{k / bins:.{digits}f}_{(k + 1) / bins:.{digits}f}"


def _bin(ratio: float, bins: int) -> int:
    return max(0, math.ceil(ratio * bins - 1e-9) - 1)


def _score(task: str, rows: list[dict[str, Any]], metric: str, name: str, resamples: int, seed: int) -> Score | None:
    by_prompt: dict[int, list[float]] = {}
    for row in rows:
        if metric in row:
            by_prompt.setdefault(row["prompt"], []).append(row[metric])
    if not by_prompt:
        return None
    means = [sum(v) / len(v) for _, v in sorted(by_prompt.items())]
    interval = bootstrap(means, resamples, seed) if len(means) > 1 else None
    better, unit = METRICS[metric]
    return Score(
        task=task,
        metric=metric,
        filter=name,
        value=sum(means) / len(means),
        stderr=interval.stderr if interval else None,
        n=len(means),
        higher_is_better=better,
        task_version=TASK_VERSION,
        num_fewshot=None,
        ci_low=interval.low if interval else None,
        ci_high=interval.high if interval else None,
        unit=unit,
    )
