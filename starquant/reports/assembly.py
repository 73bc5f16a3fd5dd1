"""A paper's table from runs: a section a model, a row a method, our figures and the paper's side by side."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from starquant.errors import RecordError
from starquant.reports.choice import of_most_tasks, rank_of
from starquant.reports.definitions import FULL, NINE, PAPER_MODELS, PAPER_TASKS, PRIMARY, Definition, RowOf
from starquant.reports.run import Run
from starquant.reports.seeds import method_seed
from starquant.reports.selection import one_a_seed, validate_together
from starquant.statistics.bootstrap import average_bootstrap, mean_over_models, resampled_means, standard_error
from starquant.store.items import trajectories_of
from starquant.store.record import Score

Numbers = NDArray[np.float64]
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
        cells = _measured_cells(rows[row.label], tasks, {WHOLE: whole, definition.against or "": reference})
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


def _measured_cells(runs: Runs, tasks: Sequence[str], others: dict[str, Runs]) -> dict[str, Estimate]:
    """Return the cells of a row: tasks, their average, its differences to other rows, KL."""
    if not runs:
        return {}
    cells: dict[str, Estimate] = {}
    resampled: list[Numbers] = []
    for index, task in enumerate(tasks):
        known = _scores(runs, task, *PRIMARY.get(task, (None, None)))
        if len(known) == len(runs):
            resampled.append(100 * _means(list(runs.values()), task, index))
            single = known[0][1].stderr if len(known) == 1 else None
            spread = standard_error(resampled[-1]) if single is None else 100 * single
            n = len(primary_numbers(known[0][0], task)[1])
            cells[task] = Estimate(100 * _mean_of_scores(known), spread, n=n)
    if tasks and all(task in cells for task in tasks):
        average = float(np.mean([cells[task].value for task in tasks]))
        cells[AVERAGE] = Estimate(average, standard_error(np.mean(resampled, axis=0)))
        for name, other in others.items():
            pairs = [pair for pair in _pairs(runs, other) if {*tasks} <= {*pair[1].get("tasks.names")}]
            if pairs and not all(a is b for a, b in pairs):
                cells[to(name)] = _difference(pairs, tasks)
    return cells | _kl(runs)


def _pairs(runs: Runs, other: Runs) -> list[tuple[Run, Run]]:
    """Return runs of equal seeds; one without rotation goes with every rotation of the other."""
    rotations: dict[tuple[Any, Any], list[tuple[Any, ...]]] = {}
    for model, rotation, seed in other:
        rotations.setdefault((model, seed), []).append((model, rotation, seed))
    return [
        (run, other[partner])
        for (model, rotation, seed), run in runs.items()
        for partner in rotations.get((model, seed), ())
        if rotation == partner[1] or None in (rotation, partner[1])
    ]


def primary_numbers(run: Run, task: str) -> tuple[str, Numbers]:
    """Return which items they are, and a task's primary metric for each; raises RecordError where there are none."""
    if task not in run.arrays:
        run.arrays[task] = _read_numbers(run, task)
    items: tuple[str, Numbers] = run.arrays[task]
    return items


def _read_numbers(run: Run, task: str) -> tuple[str, Numbers]:
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
    return " ".join(digests), np.asarray(numbers, dtype=np.float64)


def _by_model(pairs: Sequence[tuple[Any, Numbers]]) -> list[Numbers]:
    """Return [runs, items] of each model seed."""
    models: dict[Any, list[Numbers]] = {}
    for seed, numbers in pairs:
        models.setdefault(seed, []).append(numbers)
    return [np.stack(numbers) for numbers in models.values()]


def _scores(runs: Runs, task: str, metric: str | None, filter_name: str | None) -> list[tuple[Run, Score]]:
    """Return the runs that have a score, with it."""
    scores = [(run, run.score(task, metric, filter_name)) for run in runs.values()]
    return [(run, score) for run, score in scores if score is not None]


def _mean_of_scores(scores: Sequence[tuple[Run, Score]]) -> float:
    """Return the mean over models, which count alike, of means over their runs."""
    pairs = [(run.get("model.seed"), np.asarray(score.value)) for run, score in scores]
    return mean_over_models(_by_model(pairs))


def _means(runs: Sequence[Run], task: str, index: int) -> Numbers:
    """Return resampled means of a task over models, runs and items."""
    items = [primary_numbers(run, task) for run in runs]
    for run, (digest, _) in zip(runs, items, strict=True):
        if digest != items[0][0]:
            raise RecordError(f"{runs[0].path.name} and {run.path.name}: their items of {task} differ")
    pairs = [(run.get("model.seed"), numbers) for run, (_, numbers) in zip(runs, items, strict=True)]
    return resampled_means(_by_model(pairs), task=index)


def _difference(pairs: Sequence[tuple[Run, Run]], tasks: Sequence[str]) -> Estimate:
    """Return the difference of averages, paired by seeds and items; every task has draws of items of its own."""
    samples: list[list[Numbers]] = []
    for task in tasks:
        differences = []
        for a, b in pairs:
            (left_digest, left), (right_digest, right) = primary_numbers(a, task), primary_numbers(b, task)
            if left_digest != right_digest:
                raise RecordError(f"{a.path.name} and {b.path.name}: their items of {task} differ")
            differences.append((a.get("model.seed"), 100 * (left - right)))
        samples.append(_by_model(differences))
    interval = average_bootstrap(samples)
    return Estimate(interval.mean, interval.stderr, interval.low, interval.high)


def _kl(runs: Runs) -> dict[str, Estimate]:
    """Return the mean KL of fidelity, where every run has one, of the same trajectories for each model."""
    known = _scores(runs, "fidelity", "kl", "all")
    trajectories = {str((run.get("model.seed"), trajectories_of(run.record.spec))) for run in runs.values()}
    if len(known) < len(runs) or len(trajectories) > len({run.get("model.seed") for run in runs.values()}):
        return {}
    pairs = []
    for run in runs.values():
        columns = run.items.get("fidelity")
        if columns is None or "kl,none" not in columns.values:
            raise RecordError(f"{run.path}: its items of fidelity have no kl")
        pairs.append((run.get("model.seed"), np.asarray(columns.values["kl,none"], dtype=np.float64)))
    return {
        "KL": Estimate(_mean_of_scores(known), standard_error(resampled_means(_by_model(pairs))), n=len(pairs[0][1]))
    }


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
