"""Rows of a page: the runs of one experiment each, whatever their seeds; what cannot stand in one is told, not lost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starquant.errors import RecordError
from starquant.reports.across_seeds import FIDELITY_METRICS
from starquant.reports.choice import TASKS, differences, rank_of
from starquant.reports.definitions import FULL, PRIMARY, Definition
from starquant.reports.run import Run
from starquant.reports.samples import Column, Items, Row, metric_items, primary_items
from starquant.reports.seeds import METHOD_SEEDS, seeds_of
from starquant.reports.selection import one_a_seed
from starquant.store.items import is_fidelity

#: What tells runs of one row apart: seeds, the files that follow from them, and which tasks were scored.
WITHIN = {"model.seed", "model.fingerprint", *METHOD_SEEDS, *TASKS}
#: Keys that a row is named by already, and words of these.
NAMED = {"model.name", "bits.name", "method.name", "method.algorithm"}


@dataclass
class PageRow:
    """One row of the page.

    Attributes:
        model, bits, method: as the records have them.
        label: how the row is called beside its model and bits.
        name: how it is called alone, on charts.
        runs: one a seed of the model and of the method, in their order.
        row: their numbers, item by item; of runs without items there are none.
    """

    model: str
    bits: str
    method: str
    label: str
    runs: list[Run]
    row: Row = field(default_factory=lambda: Row(("",)))
    name: str = ""

    @property
    def is_full_precision(self) -> bool:
        """Whether nothing is quantized in it."""
        return self.runs[0].matches(FULL)

    @property
    def n_seeds(self) -> tuple[int, int]:
        """How many model seeds and how many of the method it has."""
        of_model, of_method, _ = zip(*map(seeds_of, self.runs), strict=True)
        return len({*of_model}), len({*of_method})


def rows_of(runs: Sequence[Run], definition: Definition | None, refused: list[str]) -> list[PageRow]:
    """Return the rows that runs make, full precision first.

    Args:
        runs: of one page.
        definition: of the experiment whose rows they are, by its labels; None for a row each method, bit-width and
            further setting that tells runs apart.
        refused: takes a line for every run that cannot stand in a row.
    """
    if definition is None:
        groups = _by_settings(runs)
    else:
        groups = [
            (row.label, [run for run in of_model if run.matches(row.where) and run.get("bits.name") == bits])
            for of_model in _by("model.name", runs)
            for bits in dict.fromkeys(run.get("bits.name") for run in of_model)
            for row in definition.rows
        ]
    name = "" if definition is None else definition.name
    rows = [_row(label, own, name, refused) for label, own in groups if own]
    if definition is None:
        rows.sort(key=lambda row: (row.bits, _natural(row.label)))
    several = len({row.model for row in rows}) > 1
    for row in rows:
        parts = [row.model if several else "", "" if row.is_full_precision else row.bits, row.label]
        row.name = " ".join(part for part in parts if part)
    return sorted(rows, key=lambda row: (row.model, not row.is_full_precision))


def _natural(label: str) -> list[tuple[int, str]]:
    """Return what sorts 4 before 16."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", label)]


def _by(key: str, runs: Iterable[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str(run.get(key)), []).append(run)
    return list(groups.values())


def _by_settings(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Return runs that are one experiment but for seeds and tasks together, named by what tells them from others."""
    groups: list[tuple[str, list[Run]]] = []
    for of_model in _by("model.name", runs):
        for of_bits in _by("bits.name", of_model):
            for of_method in _by("method.name", of_bits):
                groups += _apart(of_method)
    return groups


def _apart(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    parts: list[list[Run]] = []
    for run in runs:
        same = next((part for part in parts if {*differences(part[0], run)} <= WITHIN), None)
        if same is None:
            parts.append([run])
        else:
            same.append(run)
    keys = dict.fromkeys(key for part in parts[1:] for key in differences(parts[0][0], part[0]))
    telling = [key for key in keys if key not in WITHIN | NAMED]
    return [(_named(part[0], telling), part) for part in parts]


def _named(run: Run, keys: Sequence[str]) -> str:
    name = "full precision" if run.matches(FULL) else f"{run.get('method.name')}"
    shown = [f"{key.removeprefix('method.')}={run.get(key)}" for key in keys if not isinstance(run.get(key), dict)]
    return f"{name} ({', '.join(shown)})" if shown else name


def _row(label: str, runs: Sequence[Run], experiment: str, refused: list[str]) -> PageRow:
    """Return a row of the runs that go together; each of the others is told in a line."""
    kept: list[Run] = []
    rank = rank_of(experiment)
    try:
        kept = [*one_a_seed(label, runs, rank).values()]
    except RecordError:
        for run in runs:
            try:
                kept = [*one_a_seed(label, [*kept, run], rank).values()]
            except RecordError as error:
                refused.append(f"{run.path.name}: {error}")
    first = kept[0]
    row = Row((str(first.get("bits.name")), label))
    for run in kept:
        numbers = numbers_of(run, refused)
        if numbers:
            row.add(seeds_of(run)[:2], run, numbers)
    if len(row.runs) < len(kept):
        row.runs.clear()  # a mean over some of them would not be the row's
    return PageRow(str(first.get("model.name")), row.label[0], str(first.get("method.name")), label, kept, row)


def numbers_of(run: Run, refused: list[str]) -> dict[Column, Items]:
    """Return a run's numbers, one an item, of the primary metric of every task and of fidelity.

    Args:
        run: with its items; of one without, nothing.
        refused: takes a line for every task whose items are not there.
    """
    columns: dict[Column, Items] = {}
    try:
        of_fidelity = [task for task in run.items if is_fidelity(task)]
    except RecordError as error:
        if run.record.scores:
            refused.append(f"{error}; its scores stand without paired differences")
        return columns
    for task in run.get("tasks.names") or ():
        score = run.score(task, *PRIMARY.get(task, (None, None)))
        try:
            items = primary_items(run, task)
        except RecordError as error:
            refused.append(f"{error}; its score stands without paired differences")
            continue
        if score is not None:
            columns[task, score.metric] = items
    for column in ((task, metric) for task in of_fidelity for metric in FIDELITY_METRICS):
        if (numbers := metric_items(run, *column)) is not None:
            columns[column] = numbers
    return columns


def missing(rows: Sequence[PageRow], definition: Definition | None) -> list[str]:
    """Return what an experiment's page lacks: rows without a run, tasks that were left out, for whatever reason."""
    lines = []
    if definition is not None:
        labels = {row.label for row in rows}
        lines += [f"{row.label}: no record" for row in definition.rows if row.label not in labels]
    left_out: Mapping[tuple[str, str], Any] = {
        (row.label, task): why for row in rows for run in row.runs for task, why in run.left_out.items()
    }
    return lines + [f"{label}: {task} left out: it {why}" for (label, task), why in left_out.items()]
