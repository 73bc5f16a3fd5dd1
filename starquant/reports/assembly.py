"""A paper's table from runs: a section a model, a row a method, our figures and the paper's side by side."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from starquant.errors import RecordError
from starquant.reports.choice import of_most_tasks, rank_of
from starquant.reports.definitions import FULL, NINE, PAPER_MODELS, PAPER_TASKS, PRIMARY, Definition, RowOf
from starquant.reports.run import Run
from starquant.reports.samples import Numbers, Row, metric_items, primary, row_of
from starquant.reports.seeds import method_seed
from starquant.reports.selection import one_a_seed, validate_together
from starquant.statistics.bootstrap import average_bootstrap, mean_over_models, resampled_means, standard_error
from starquant.store.items import trajectories_of
from starquant.store.record import Score

KL = ("fidelity", "kl")
Runs = dict[tuple[Any, ...], Run]
PAPER_MARK = " (paper)"
AVERAGE, WHOLE = "average", "full precision"


@dataclass(frozen=True)
class Estimate:
    """A figure in the unit it is shown in, its standard error, a 95 % interval, and the items (of fidelity, prompts) of
    each run behind it; None where there is none.
    """

    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Section:
    """One model's part of a table.

    Attributes:
        model: its name.
        columns: in order; those of the paper end in " (paper)".
        rows: (label, number of runs, cells by column); a cell that is not there is empty.
        limit: items a task, where tasks were cut.
        approximations: of its runs' evaluation.
        left_out: tasks that its runs left out and none scored; their columns are empty.
        seeds: (label, seeds of the method) of each row.
    """

    model: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, int, dict[str, Estimate]], ...]
    limit: int | None = None
    approximations: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    seeds: tuple[tuple[str, tuple[int | None, ...]], ...] = ()


def to(label: str) -> str:
    """Return the name of the column of differences of averages to a row."""
    return f"average, to {label}"


def assemble(
    definition: Definition, runs: Sequence[Run], allow: Sequence[str] = (), made: Collection[str] = ()
) -> list[Section]:
    """Return a table's sections: models that were run, then those of which only the paper has figures.

    Args:
        definition: of the table.
        runs: its own are chosen among these.
        allow: what `selection.ALLOWED` names.
        made: file names of records that come first where others compete for a row.

    Raises:
        RecordError: runs that do not go together, two runs of one row and seeds, damaged items.
    """
    chosen = [run for run in runs if any(run.matches(row.where) for row in definition.rows)]
    paper = None if definition.paper is None else pd.read_csv(definition.paper)
    names = sorted({str(run.get("model.name")) for run in chosen})
    if paper is not None:
        names += [
            name for name, paper_name in PAPER_MODELS.items() if name not in names and paper_name in set(paper["model"])
        ]
    sections, rank = [], rank_of(definition.name, made)
    for name in names:
        of_model = [run for run in chosen if run.get("model.name") == name]
        of_model = [run for run in of_model if run.get("tasks.names")] or of_model  # figure 3's runs score no task
        settings = _quantized_settings(of_model)
        rows: dict[str, Runs] = {}
        for row in definition.rows:
            label = f"{name}: {row.label}"
            rows[row.label] = of_most_tasks(label, one_a_seed(label, _of_row(row, of_model, settings), rank))
        validate_together([run for row_runs in rows.values() for run in row_runs.values()], allow)
        sections.append(_section(definition, name, rows, paper))
    return sections


def _quantized_settings(runs: Sequence[Run]) -> set[tuple[Any, ...]]:
    """Return the task sets of the quantized runs: full precision may have been scored on others as well."""
    return {_scored(run) for run in runs if not run.matches(FULL)}


def _scored(run: Run) -> tuple[Any, ...]:
    return (tuple(run.get("tasks.names")), run.get("tasks.limit"), run.get("seed"), run.get("model.dtype"))


def _of_row(row: RowOf, runs: Sequence[Run], settings: set[tuple[Any, ...]]) -> list[Run]:
    matching = [run for run in runs if run.matches(row.where)]
    return [run for run in matching if not settings or _scored(run) in settings]


def _section(definition: Definition, model: str, rows: dict[str, Runs], paper: pd.DataFrame | None) -> Section:
    shown_runs = [run for runs in rows.values() for run in runs.values()]
    tasks = list(dict.fromkeys(task for run in shown_runs for task in run.get("tasks.names")))
    left_out = tuple(dict.fromkeys(task for run in shown_runs for task in run.left_out if task not in tasks))
    has_runs = bool(tasks)
    tasks = tasks or list(NINE if paper is not None and "gsm8k" in paper else ())
    whole = next((rows[row.label] for row in definition.rows if row.where == FULL), {})
    reference = rows.get(definition.against or "", {})
    paper_name = PAPER_MODELS.get(model)
    of_paper = None if paper is None or paper_name is None else paper[paper["model"] == paper_name]
    lines = []
    for row in definition.rows:
        cells = _measured_cells(row.label, rows[row.label], tasks, {WHOLE: whole, definition.against or "": reference})
        if of_paper is not None:
            cells |= _paper_cells(row, of_paper)
        lines.append((row.label, len(rows[row.label]), cells))
    seen = {column for _, _, cells in lines for column in cells}
    order = [*_in_order((*tasks, *left_out)), AVERAGE, to(WHOLE), to(definition.against or ""), "KL"]
    empty = left_out if has_runs else (*tasks, AVERAGE)
    shown = [column for column in order if column in seen or column in empty]
    columns = []
    for column in shown:
        columns += [column, *([column + PAPER_MARK] if column + PAPER_MARK in seen else [])]
    columns += [column for column in sorted(seen) if column.endswith(PAPER_MARK) and column not in columns]
    first = next(iter(shown_runs), None)
    limit, shortcuts = (None, ()) if first is None else (first.get("tasks.limit"), tuple(first.speed.approximations))
    seeds = tuple((label, tuple(dict.fromkeys(method_seed(run) for run in of.values()))) for label, of in rows.items())
    return Section(paper_name or model, tuple(columns), tuple(lines), limit, shortcuts, left_out, seeds)


def _in_order(tasks: Sequence[str]) -> list[str]:
    """Return the paper's tasks in its order, others as they come."""
    return sorted(tasks, key=NINE.index) if {*tasks} <= {*NINE} else list(tasks)


def _measured_cells(label: str, runs: Runs, tasks: Sequence[str], others: dict[str, Runs]) -> dict[str, Estimate]:
    """Return the cells of a row: tasks, their average, its differences to other rows, KL."""
    if not runs:
        return {}
    cells: dict[str, Estimate] = {}
    resampled: list[Numbers] = []
    for index, task in enumerate(tasks):
        known = _scores(runs, task, *PRIMARY.get(task, (None, None)))
        if len(known) == len(runs):
            numbers = row_of(label, runs, [task]).numbers(primary(task))
            resampled.append(100 * resampled_means(numbers, task=index))
            single = known[0][1].stderr if len(known) == 1 else None
            spread = standard_error(resampled[-1]) if single is None else 100 * single
            cells[task] = Estimate(100 * _mean_of_scores(known), spread, n=numbers[0].shape[1])
    if tasks and all(task in cells for task in tasks):
        average = float(np.mean([cells[task].value for task in tasks]))
        cells[AVERAGE] = Estimate(average, standard_error(np.mean(resampled, axis=0)))
        for name, other in others.items():
            if (difference := _difference(label, runs, name, other, tasks)) is not None:
                cells[to(name)] = difference
    return cells | _kl(label, runs)


def _difference(label: str, runs: Runs, name: str, other: Runs, tasks: Sequence[str]) -> Estimate | None:
    """Return the difference of averages, paired by seeds and items; None to itself, and where nothing can be paired.

    Every task has draws of items of its own.
    """
    whole = {seeds: run for seeds, run in other.items() if {*tasks} <= {*run.get("tasks.names")}}
    row, reference = row_of(label, runs, tasks), row_of(name, whole, tasks)
    pairs = row.pairs(reference)
    if not pairs or all(runs[a] is whole[b] for a, b in pairs):
        return None
    interval = average_bootstrap([[100 * one for one in row.minus(reference, primary(task))] for task in tasks])
    return Estimate(interval.mean, interval.stderr, interval.low, interval.high)


def _scores(runs: Runs, task: str, metric: str | None, filter_name: str | None) -> list[tuple[Run, Score]]:
    """Return the runs that have a score, with it."""
    scores = [(run, run.score(task, metric, filter_name)) for run in runs.values()]
    return [(run, score) for run, score in scores if score is not None]


def _mean_of_scores(scores: Sequence[tuple[Run, Score]]) -> float:
    """Return the mean over models, which count alike, of means over their runs."""
    values: dict[Any, list[float]] = {}
    for run, score in scores:
        values.setdefault(run.get("model.seed"), []).append(score.value)
    return mean_over_models([np.array(of_model) for of_model in values.values()])


def _kl(label: str, runs: Runs) -> dict[str, Estimate]:
    """Return the mean KL of fidelity, where every run has one, of the same trajectories for each model."""
    known = _scores(runs, "fidelity", "kl", "all")
    trajectories = {str((run.get("model.seed"), trajectories_of(run.record.spec))) for run in runs.values()}
    if len(known) < len(runs) or len(trajectories) > len({run.get("model.seed") for run in runs.values()}):
        return {}
    row = Row((label,))
    for seeds, run in runs.items():
        if (items := metric_items(run, *KL)) is None:
            raise RecordError(f"{run.path}: its items of fidelity have no kl")
        row.add(seeds, run, {KL: items})
    numbers = row.numbers(KL)
    return {"KL": Estimate(_mean_of_scores(known), standard_error(resampled_means(numbers)), n=numbers[0].shape[1])}


def _paper_cells(row: RowOf, paper: pd.DataFrame) -> dict[str, Estimate]:
    """Return the paper's figures of a row, by column, marked as the paper's."""
    if row.paper is None:
        return {}
    chosen = paper
    for column, value in row.paper.items():
        if column in chosen:
            chosen = chosen[chosen[column] == value]
    if len(chosen) != 1:
        return {}
    line = chosen.iloc[0]
    cells = {
        task + PAPER_MARK: Estimate(float(line[column]))
        for task, column in PAPER_TASKS.items()
        if column in line and not pd.isna(line[column])
    }
    cells[AVERAGE + PAPER_MARK] = Estimate(float(line["avg"]))
    whole = paper[(paper[[name for name in ("method", "variant") if name in paper]] == "FP16").any(axis=1)]
    if len(whole) == 1 and row.where != FULL:
        drop = float(line["avg"]) - float(whole.iloc[0]["avg"])
        cells[to(WHOLE) + PAPER_MARK] = Estimate(drop)
    return cells
