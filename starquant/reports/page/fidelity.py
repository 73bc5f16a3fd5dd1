"""How closely rows follow full precision: by mask ratio, by denoising step, and when answers part from its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from starquant.errors import RecordError
from starquant.reports.frame import by_step, steps_frame
from starquant.reports.page.rows import PageRow
from starquant.reports.page.table import TERMS, rounded
from starquant.reports.run import Run
from starquant.statistics.bootstrap import bootstrap
from starquant.store.items import FIDELITY

BIN = re.compile(r"mask_ratio_([\d.]+)_([\d.]+)")
Point = dict[str, Any]


def by_mask_ratio(rows: Sequence[PageRow]) -> list[Point]:
    """Return a point a row, metric and bin of mask ratios: mean over runs, with the interval of a single one."""
    points = []
    for row in rows:
        bins: dict[tuple[str, str], list[Any]] = {}
        for run in row.runs:
            for score in run.record.scores:
                if score.task == FIDELITY and score.metric in TERMS and BIN.fullmatch(score.filter):
                    bins.setdefault((score.metric, score.filter), []).append(score)
        for (metric, name), scores in bins.items():
            match = BIN.fullmatch(name)
            assert match is not None
            scale, single = (100.0 if metric == "top1_agreement" else 1.0), len(scores) == 1
            mean = rounded(scale * sum(score.value for score in scores) / len(scores))
            low, high = (
                rounded(scale * end) if single and end is not None else None
                for end in (scores[0].ci_low, scores[0].ci_high)
            )
            at = (float(match[1]) + float(match[2])) / 2
            points.append({"row": row.name, "metric": metric, "x": at, "mean": mean, "low": low, "high": high})
    return points


def along_steps(rows: Sequence[PageRow]) -> tuple[list[Point], list[Point]]:
    """Return a point a row, metric and denoising step, and one a row and step of how many answers have parted.

    Values are means over prompts, each prompt's over runs, with 95 % bootstrap intervals over prompts. An answer has
    parted once a step commits another token than full precision does.
    """
    metrics: list[Point] = []
    parted: list[Point] = []
    for row in rows:
        steps = pd.concat([_steps(run) for run in row.runs])
        for metric in sorted(TERMS):
            for step, numbers in by_step(steps, metric).items():
                if len(numbers) > 1:
                    metrics.append({"row": row.name, "metric": metric, "x": step + 1} | _interval(metric, numbers))
        parted += _parted(row.name, steps.dropna(subset="commit_flips"))
    return metrics, parted


def _steps(run: Run) -> pd.DataFrame:
    """Return a run's fidelity along trajectories; nothing where it follows none or the rows were not kept."""
    try:
        return steps_frame([run] if run.get("fidelity.states") is None else [])
    except RecordError:
        return steps_frame([])


def _interval(metric: str, numbers: Sequence[float]) -> dict[str, float]:
    scale = 100.0 if metric == "top1_agreement" else 1.0
    interval = bootstrap([scale * number for number in numbers], resamples=500)
    return {"mean": rounded(interval.mean), "low": rounded(interval.low), "high": rounded(interval.high)}


def _parted(name: str, steps: pd.DataFrame) -> list[Point]:
    """Return, for each step, the share of answers of which a token was committed otherwise by then, in percent."""
    flips = steps.pivot_table(index=["record", "prompt"], columns="step", values="commit_flips")
    apart = (flips > 0).astype(float).cummax(axis=1).where(flips.notna().cummax(axis=1))
    shares: dict[Any, float] = apart.mean().to_dict()
    return [{"row": name, "x": int(step) + 1, "mean": rounded(100 * share)} for step, share in shares.items()]
