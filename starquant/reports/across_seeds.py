"""Methods over independently trained models and rotation seeds: means, and paired differences to one of them.

    python -m starquant.reports.across_seeds results/published/testbed_methods --against quarot

A row is a method at a bit-width; its runs differ by `model.seed` and the method's own (`method.rotation_seed`,
`method.start_seed`). Runs of two methods are paired by both seeds and by item; a method that draws nothing is paired
with every seed of the other. Intervals are 95 % bootstrap intervals over the methods' seeds and items, the same draw
for all models. These count alike and are not resampled: intervals do not generalise over models. Rows of fewer than
three seeds are named below the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from starquant.errors import RecordError, one_line_errors, user_path
from starquant.reports import selection
from starquant.reports.choice import Rank, Where, conditions, conflict, differences, first_of, taken, unranked
from starquant.reports.comparison import column_name, markdown
from starquant.reports.run import Run
from starquant.reports.samples import Column, Items, Row, Seeds, metric_items
from starquant.reports.seeds import seeds_of, warning
from starquant.statistics.bootstrap import crossed_bootstrap
from starquant.store.items import is_fidelity, items_folder

FIDELITY_METRICS = ("kl", "top1_agreement", "hidden_mse")


def read_rows(folder: Path, by: Sequence[str] = (), where: Where | None = None) -> list[Row]:
    """Read the records below a folder, but for those of some items only, unless `where` asks for them.

    Args:
        folder: of records with their items beside them.
        by: dotted configuration keys that tell rows apart, beside bits and method.
        where: dotted configuration keys and values that records must have.

    Raises:
        ConfigError: a value that no record has.
        RecordError: no record, damaged records or items, two records of the same row and seeds.
    """
    rows: dict[tuple[str, ...], Row] = {}
    runs = taken(folder, selection.read_runs(folder), where or {})
    if not runs:
        raise RecordError(f"{folder}: holds no record")
    selection.validate_speed({run.path: run.record.spec for run in runs})
    for run in runs:
        label = tuple(str(v) if (v := run.get(key)) is not None else "" for key in (*by, "bits.name", "method.name"))
        add_run(rows.setdefault(label, Row(label)), run)
    return list(rows.values())


def add_run(row: Row, run: Run, rank: Rank = unranked) -> None:
    """Give a row one more run, but for a copy of one; raises RecordError where it has another of its seeds and rank."""
    seeds = seeds_of(run)[:2]
    other = row.sources.get(seeds)
    if other is not None:
        differ = differences(other, run)
        if not differ and other.record.scores == run.record.scores:
            return
        first = first_of(" ".join(row.label), other, run, rank)
        if first is other:
            return
        if first is None:
            raise RecordError(_second(row, seeds, run, other))
    row.add(seeds, run, _numbers(run))


def _second(row: Row, seeds: Seeds, run: Run, other: Run) -> str:
    return (
        f"{run.path.name}: a second record of {' '.join(row.label)}, model seed {seeds[0]}, rotation seed {seeds[1]}, "
        f"beside {other.path.name}; {conflict(other, run, differences(other, run))}"
    )


def _numbers(run: Run) -> dict[Column, Items]:
    items_by_column: dict[Column, Items] = {}
    names = [*run.get("tasks.names")]
    names += dict.fromkeys(score.task for score in run.record.scores if is_fidelity(score.task))
    columns = run.items if names else {}
    for task in names:
        if task not in columns:
            raise RecordError(f"{items_folder(run.path)}: holds no items of {task}")
        keys = [key.rpartition(",") for key in columns[task].values]
        for metric, _, filter_name in keys:
            if not is_fidelity(task) or metric in FIDELITY_METRICS:
                several = sum(other == metric for other, _, _ in keys) > 1
                items = metric_items(run, task, metric, filter_name)
                assert items is not None
                items_by_column[task, f"{metric} ({filter_name})" if several else metric] = items
    return items_by_column


def table(rows: Sequence[Row], against: str | None = None, columns: Sequence[Column] | None = None) -> pd.DataFrame:
    """Return cells as text: "mean (standard error)", or "difference [low, high]" to the method named.

    Fractions are in percent (differences in points), KL in nats, hidden_mse as it is.

    Args:
        rows: a method and bit-width each.
        against: method that the others are compared with; None gives the values.
        columns: to show; None for all.

    Raises:
        RecordError: no such method.
    """
    columns = columns or list(dict.fromkeys(column for row in rows for column in row.columns()))
    names = [row.label[-1] for row in rows]
    if against is not None and against not in names:
        raise RecordError(f"--against: got '{against}', allowed: {', '.join(dict.fromkeys(names))}")
    lines = []
    for row in rows if against is None else [r for r in rows if r.label[-2] in _bits_of(rows, against)]:
        other = next((r for r in rows if r.label[-2:] == (row.label[-2], against)), None)
        other = next((r for r in rows if r.label == (*row.label[:-1], against)), other)  # the nearest one first
        cells: dict[str, Any] = {"bits": " ".join(row.label[:-1]), "method": row.label[-1]}
        cells["runs" if against is None else "pairs"] = _count(row, other if against else None)
        cells["n"] = _items(row, [column for column in columns if column in row.columns()])
        for column in columns:
            cells[column_name(*column)] = _cell(row, other, column, against is not None)
        lines.append(cells)
    return pd.DataFrame(lines)


def warning_of(rows: Sequence[Row]) -> str | None:
    """Return the warning that names rows of few seeds; None where there are none."""
    return warning((" ".join(row.label), [seeds[1] for seeds in row.runs]) for row in rows)


def _items(row: Row, columns: Sequence[Column]) -> str:
    """Return the number of items behind a row's columns; where they differ, the least and the most."""
    sizes = [len(items[column].numbers) for items in row.runs.values() for column in columns]
    return "-".join(str(n) for n in sorted({min(sizes), max(sizes)})) if sizes else ""


def _bits_of(rows: Sequence[Row], method: str) -> set[str]:
    return {row.label[-2] for row in rows if row.label[-1] == method}


def _count(row: Row, other: Row | None) -> int:
    """Return the number of runs, or of pairs with another method's."""
    if other is None:
        return len(row.runs)
    return len(row.pairs(other))


def _cell(row: Row, other: Row | None, column: Column, difference: bool) -> str:
    if column not in row.columns():
        return ""
    comparable = other is not None and other is not row and column in other.columns() and _count(row, other) > 0
    if difference and not comparable:
        return ""
    try:
        interval = crossed_bootstrap(row.minus(other, column) if difference and other else row.numbers(column))
    except ValueError as error:
        raise RecordError(f"{' '.join(row.label)}: {column[0]} {column[1]}: {error}") from None
    percent = column[1] not in ("kl", "hidden_mse")
    scale, digits = (100.0, ".1f") if percent else (1.0, ".3g")
    mean, stderr, low, high = (scale * x for x in (interval.mean, interval.stderr, interval.low, interval.high))
    if difference:
        return f"{mean:+{digits}} [{low:+{digits}}, {high:+{digits}}]"
    return f"{mean:{digits}} ({stderr:{digits if percent else '.1g'}})"


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table; returns 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m starquant.reports.across_seeds", description=__doc__)
    parser.add_argument("folder", type=user_path, help="folder of records, NAME.json, with NAME.items beside them")
    parser.add_argument("--against", help="method that the others are compared with, pair by pair")
    parser.add_argument(
        "--by", action="append", default=[], help="dotted key that tells rows apart, e.g. method.tac.block_size"
    )
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only records that have this")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        raise RecordError(f"{options.folder}: no such folder of records")
    rows = read_rows(options.folder, options.by, conditions(options.where))
    print(markdown(table(rows, options.against)))
    if (note := warning_of(rows)) is not None:
        print(f"\n{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
