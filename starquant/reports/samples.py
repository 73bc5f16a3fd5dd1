"""Numbers of items by seeds: what means, errors and paired differences of every table, page and figure are taken of.

Runs of two rows are paired by all their seeds and by item; a method that draws nothing is paired with every seed of
the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starquant.errors import RecordError
from starquant.reports.definitions import PRIMARY
from starquant.reports.run import Run
from starquant.store.items import is_fidelity, trajectories_of

Numbers = NDArray[np.float64]
#: (task, metric).
Column = tuple[str, str]
#: Of the model, of the method, and of what else tells runs of a row apart; None where there is none.
Seeds = tuple[int | None, ...]


@dataclass(frozen=True)
class Items:
    """One number an item, and a digest that says which items."""

    digest: str
    numbers: Numbers


@dataclass
class Row:
    """All runs of one method at one bit-width: by their seeds, numbers of each column, one an item."""

    label: tuple[str, ...]
    runs: dict[Seeds, dict[Column, Items]] = field(default_factory=dict)
    sources: dict[Seeds, Run] = field(default_factory=dict)

    def add(self, seeds: Seeds, run: Run, columns: dict[Column, Items]) -> None:
        """Take a run's numbers, in place of those of its seeds."""
        self.runs[seeds], self.sources[seeds] = columns, run

    def columns(self) -> list[Column]:
        """Return the columns that every run has."""
        per_run = [list(columns) for columns in self.runs.values()]
        return [column for column in per_run[0] if all(column in columns for columns in per_run)]

    def numbers(self, column: Column) -> list[Numbers]:
        """Return [runs, items] of each model; raises RecordError for items that differ between runs."""
        runs = _sorted(self.runs)
        return [self._stack([run for run in runs if run[0] == m], column) for m in _models(self.runs)]

    def pairs(self, other: Row) -> list[tuple[Seeds, Seeds]]:
        """Return the runs of equal seeds, in their order."""
        return [(a, b) for a in _sorted(self.runs) for b in _sorted(other.runs) if _match(a, b)]

    def minus(self, other: Row, column: Column) -> list[Numbers]:
        """Return differences [pairs, items] of each model that both have, paired by seeds and items.

        Raises:
            RecordError: no common model, items that differ, fidelity of other trajectories.
        """
        pairs = self.pairs(other)
        if not pairs:
            raise RecordError(f"{' '.join(self.label)} and {' '.join(other.label)}: no runs of the same seeds")
        for a, b in pairs:
            if not self._alike(a, other, b, column):
                raise RecordError(
                    f"{' '.join(self.label)}: items of {column[0]} differ from {other.label[-1]}'s: "
                    f"{self.sources[a].path.name} and {other.sources[b].path.name}"
                )
        differences = []
        for model in dict.fromkeys(a[0] for a, _ in pairs):
            own = [(a, b) for a, b in pairs if a[0] == model]
            differences.append(self._stack([a for a, _ in own], column) - other._stack([b for _, b in own], column))
        return differences

    def _alike(self, a: Seeds, other: Row, b: Seeds, column: Column) -> bool:
        """Return whether two runs' numbers are of the same items, and of fidelity along the same trajectories."""
        followed = (trajectories_of(row.sources[seeds].record.spec) for row, seeds in ((self, a), (other, b)))
        same = not is_fidelity(column[0]) or next(followed) == next(followed)
        return same and self.runs[a][column].digest == other.runs[b][column].digest

    def _stack(self, runs: Sequence[Seeds], column: Column) -> Numbers:
        """Return numbers [runs, items]."""
        items = [self.runs[run][column] for run in runs]
        for run, one in zip(runs, items, strict=True):
            if one.digest != items[0].digest:
                raise RecordError(
                    f"{' '.join(self.label)}: items of {column[0]} differ between its runs: "
                    f"{self.sources[runs[0]].path.name} and {self.sources[run].path.name}"
                )
        return np.stack([one.numbers for one in items])


def _match(a: Seeds, b: Seeds) -> bool:
    return a[0] == b[0] and a[2:] == b[2:] and (a[1] == b[1] or None in (a[1], b[1]))


def _models(runs: Iterable[Seeds]) -> list[int | None]:
    """Return the model seeds, in order."""
    return [*dict.fromkeys(seeds[0] for seeds in _sorted(runs))]


def _sorted(runs: Iterable[Seeds]) -> list[Seeds]:
    """Return runs in the order of their seeds."""
    return sorted(runs, key=lambda run: tuple(-1 if seed is None else seed for seed in run))


def primary(task: str) -> Column:
    """Return the column of a task's primary metric."""
    return task, "primary"


def row_of(label: str, runs: Mapping[Any, Run], tasks: Sequence[str]) -> Row:
    """Return the primary numbers of tasks, of runs by their seeds; raises as `primary_items`."""
    row = Row((label,))
    for seeds, run in runs.items():
        row.add(seeds, run, {primary(task): primary_items(run, task) for task in tasks})
    return row


def primary_items(run: Run, task: str) -> Items:
    """Return a task's primary metric for each of its items, of a group those of its members.

    Raises:
        RecordError: there are none.
    """
    if task not in run.arrays:
        run.arrays[task] = _read_items(run, task)
    items: Items = run.arrays[task]
    return items


def _read_items(run: Run, task: str) -> Items:
    metric, filter_name = PRIMARY.get(task, (None, None))
    score = run.score(task, metric, filter_name)
    if score is None:
        raise RecordError(f"{run.path}: has no score of {task}")
    digests, numbers = [], []
    for leaf in run.leaves(task):
        columns = run.items[leaf]
        key = f"{score.metric},{score.filter}"
        if key not in columns.values:
            raise RecordError(f"{run.path}: its items of {leaf} have no {score.metric} ({score.filter})")
        digests.append(columns.items)
        numbers += columns.values[key]
    if not numbers:
        raise RecordError(f"{run.path}: has no items of {task}")
    return Items(" ".join(digests), np.asarray(numbers, dtype=np.float64))


def metric_items(run: Run, task: str, metric: str, filter_name: str = "none") -> Items | None:
    """Return a metric for each item of a leaf task or of fidelity; None where there is none."""
    columns = run.items.get(task)
    numbers = None if columns is None else columns.values.get(f"{metric},{filter_name}")
    if columns is None or numbers is None:
        return None
    return Items(columns.items, np.asarray(numbers, dtype=np.float64))
