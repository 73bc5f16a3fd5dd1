"""The comparison: every row's figures with intervals, and the paired differences of all rows to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from starquant.errors import RecordError
from starquant.reports.assembly import AVERAGE
from starquant.reports.comparison import column_name
from starquant.reports.definitions import PRIMARY
from starquant.reports.page.rows import PageRow
from starquant.reports.samples import Column
from starquant.statistics.bootstrap import Interval, average_bootstrap, crossed_bootstrap
from starquant.store.items import is_fidelity

#: Metrics of fidelity by their terms, with unit, and whether more is better.
TERMS = {
    "kl": ("KL", "nats", False),
    "top1_agreement": ("top-1 agreement", "%", True),
    "hidden_mse": ("hidden-state error", "relative", False),
}
#: What a mean of equal numbers differs from them by, at most.
NOTHING = 1e-12
MEAN: Column = (AVERAGE, AVERAGE)


@dataclass(frozen=True)
class Shown:
    """A column: what it is of, what it is called, its unit, and whether more is better."""

    column: Column
    name: str
    unit: str
    more_is_better: bool | None

    @property
    def scale(self) -> float:
        """Of its numbers as they are shown."""
        return 100.0 if self.unit == "%" else 1.0


def columns_of(rows: Sequence[PageRow]) -> list[Shown]:
    """Return the columns that any row has, tasks first, then their average, then fidelity."""
    tasks: dict[Column, bool | None] = {}
    fidelity: dict[Column, None] = {}
    for row in rows:
        for run in row.runs:
            for score in run.record.scores:
                primary = PRIMARY.get(score.task, (None, None))[0] in (None, score.metric)
                if score.task in (run.get("tasks.names") or ()) and primary:
                    if not any(task == score.task for task, _ in tasks):
                        tasks[score.task, score.metric] = score.higher_is_better
                elif is_fidelity(score.task) and score.metric in TERMS and score.filter == "all":
                    fidelity[score.task, score.metric] = None
    shown = [Shown(column, column_name(*column), "%", better) for column, better in tasks.items()]
    if len(tasks) > 1:
        shown.append(Shown(MEAN, "average of tasks", "%", True))
    for column in fidelity:
        term, unit, better = TERMS[column[1]]
        group = column_name(*column).partition(" ")[2]
        shown.append(Shown(column, f"{term} {group}".strip(), unit, better))
    return shown


def comparison(rows: Sequence[PageRow], shown: Sequence[Shown]) -> dict[str, Any]:
    """Return the table as plain data.

    Returns:
        `columns`; `rows`, each with `cells` in the order of the columns ({mean, stderr, low, high, n}, or None);
        `differences`, "I-J" for rows I < J to cells in the order of the columns ([mean, low, high] of I minus J, or
        None where they cannot be paired); `unpaired`, why.
    """
    unpaired: dict[str, None] = {}
    pairs = {
        f"{i}-{j}": cells
        for i, a in enumerate(rows)
        for j, b in enumerate(rows[i + 1 :], i + 1)
        if a.model == b.model and any(cells := [_difference(a, b, column, shown, unpaired) for column in shown])
    }
    return {
        "columns": [
            {"name": one.name, "unit": one.unit, "better": one.more_is_better, "task": one.column[0]} for one in shown
        ],
        "rows": [_line(row, shown) for row in rows],
        "differences": pairs,
        "unpaired": [*unpaired],
    }


def _line(row: PageRow, shown: Sequence[Shown]) -> dict[str, Any]:
    models, rotations = row.n_seeds
    return {
        "model": row.model,
        "bits": row.bits,
        "label": row.label,
        "name": row.name,
        "full": row.is_full_precision,
        "runs": len(row.runs),
        "seeds": f"{models} x {rotations}" if rotations > 1 else f"{models}",
        "limit": row.runs[0].get("tasks.limit"),
        "cells": [_cell(row, column, shown) for column in shown],
    }


def _tasks(shown: Sequence[Shown]) -> list[Column]:
    return [one.column for one in shown if one.column != MEAN and not is_fidelity(one.column[0])]


def _cell(row: PageRow, one: Shown, shown: Sequence[Shown]) -> dict[str, Any] | None:
    """Return a figure with its interval; without items the mean of the scores, with lm-eval's error of a single one."""
    has = row.row.columns() if row.row.runs else []
    interval: Interval
    n: int | None = None
    try:
        if one.column == MEAN:
            if not has or any(column not in has for column in _tasks(shown)):
                return None
            interval = average_bootstrap([row.row.numbers(column) for column in _tasks(shown)])
        elif one.column in has:
            numbers = row.row.numbers(one.column)
            interval, n = crossed_bootstrap(numbers), numbers[0].shape[1]
        else:
            return _of_scores(row, one)
    except (ValueError, RecordError):
        return _of_scores(row, one)
    mean, stderr, low, high = (
        rounded(one.scale * x) for x in (interval.mean, interval.stderr, interval.low, interval.high)
    )
    return {"mean": mean, "stderr": stderr, "low": low, "high": high, "n": n}


def _of_scores(row: PageRow, one: Shown) -> dict[str, Any] | None:
    task, metric = one.column
    name = "all" if is_fidelity(task) else PRIMARY.get(task, (None, None))[1]
    scores = [score for run in row.runs if (score := run.score(task, metric, name)) is not None]
    if not scores or len(scores) < len(row.runs):
        return None
    single = scores[0] if len(scores) == 1 else None
    ends = (None,) * 3 if single is None else (single.stderr, single.ci_low, single.ci_high)
    stderr, low, high = (None if x is None else rounded(one.scale * x) for x in ends)
    mean = rounded(one.scale * float(np.mean([score.value for score in scores])))
    return {"mean": mean, "stderr": stderr, "low": low, "high": high, "n": scores[0].n}


def _difference(
    a: PageRow, b: PageRow, one: Shown, shown: Sequence[Shown], unpaired: dict[str, None]
) -> list[float] | None:
    """Return a figure of a minus b with its paired interval, None where they cannot be paired (`unpaired`: why)."""
    if not a.row.runs or not b.row.runs:
        return None
    wanted = _tasks(shown) if one.column == MEAN else [one.column]
    if any(column not in row.row.columns() for column in wanted for row in (a, b)):
        return None
    try:
        samples = [a.row.minus(b.row, column) for column in wanted]
        interval: Interval = average_bootstrap(samples) if one.column == MEAN else crossed_bootstrap(samples[0])
    except (RecordError, ValueError) as error:
        unpaired.setdefault(str(error))
        return None
    return [rounded(one.scale * x) for x in (interval.mean, interval.low, interval.high)]


def rounded(number: float) -> float:
    """Return a number to six significant digits: what a page shows fits, what it holds is small."""
    return float(f"{number:.6g}") if abs(number) > NOTHING else 0.0
