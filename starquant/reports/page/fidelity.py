"""How closely rows follow full precision: by mask ratio, by denoising step, and when answers part from its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from starquant.errors import RecordError
from starquant.reports.page.rows import PageRow
from starquant.reports.page.table import TERMS, rounded
from starquant.reports.run import Run
from starquant.statistics.bootstrap import bootstrap
from starquant.store.items import FIDELITY, read_raw

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


def by_step(rows: Sequence[PageRow]) -> tuple[list[Point], list[Point]]:
    """Return a point a row, metric and denoising step, and one a row and step of how many answers have parted.

    Values are means over prompts, each prompt's over runs, with 95 % bootstrap intervals over prompts. An answer has
    parted once a step commits another token than full precision does.
    """
    metrics: list[Point] = []
    parted: list[Point] = []
    for row in rows:
        cells: dict[tuple[str, int], dict[Any, list[float]]] = {}
        for run in row.runs:
            for line in _lines(run):
                for metric in (*TERMS, "commit_flips"):
                    if line.get("step") is not None and isinstance(line.get(metric), int | float):
                        at = cells.setdefault((metric, int(line["step"])), {})
                        at.setdefault(line["prompt"], []).append(float(line[metric]))
        for (metric, step), prompts in sorted(cells.items()):
            if metric in TERMS and len(prompts) > 1:
                metrics.append({"row": row.name, "metric": metric, "x": step + 1} | _interval(metric, prompts))
        parted += _parted(row.name, {step: at for (metric, step), at in cells.items() if metric == "commit_flips"})
    return metrics, parted


def _lines(run: Run) -> list[dict[str, Any]]:
    """Return a run's rows of fidelity along trajectories; none where it follows none or the rows were not kept."""
    if run.get("fidelity.states") is not None:
        return []
    try:
        return read_raw(run.path, FIDELITY)
    except RecordError:
        return []


def _interval(metric: str, prompts: dict[Any, list[float]]) -> dict[str, float]:
    scale = 100.0 if metric == "top1_agreement" else 1.0
    interval = bootstrap([scale * sum(numbers) / len(numbers) for numbers in prompts.values()], resamples=500)
    return {"mean": rounded(interval.mean), "low": rounded(interval.low), "high": rounded(interval.high)}


def _parted(name: str, steps: dict[int, dict[Any, list[float]]]) -> list[Point]:
    """Return, for each step, the share of prompts of which a token was committed otherwise by then, in percent."""
    points, apart = [], dict[tuple[Any, int], bool]()
    for step in sorted(steps):
        for prompt, flips in steps[step].items():
            for run, flipped in enumerate(flips):
                apart[prompt, run] = apart.get((prompt, run), False) or flipped > 0
        points.append({"row": name, "x": step + 1, "mean": rounded(100 * sum(apart.values()) / len(apart))})
    return points
