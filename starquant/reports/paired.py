"""Two runs on the same items: the paired difference of a metric and its bootstrap interval.

    python -m starquant.reports.paired A.json B.json

Items lie beside a record: A.items/TASK.jsonl. They are paired by document (fidelity: by prompt, over whose rows
the metric is averaged).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from starquant.errors import RecordError, StarquantError
from starquant.reports.selection import validate_speed
from starquant.statistics.bootstrap import PairedInterval, paired_bootstrap
from starquant.store.columns import TaskColumns, read_columns
from starquant.store.items import items_folder, trajectories_of
from starquant.store.records import read_record

HEADER = ("task", "metric", "n", "difference", "low", "high", "across zero")


def compare(
    a: Path,
    b: Path,
    task: str,
    metric: str,
    filter_name: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedInterval:
    """Return the interval of mean(a - b) of a metric over the items of two records.

    Args:
        a: a record, NAME.json, with its items in NAME.items beside it.
        b: the record it is compared with.
        task: leaf task, or "fidelity".
        metric: name of the metric in the items.
        filter_name: lm-eval filter; None where the metric has only one.
        resamples: of the bootstrap over items.
        seed: of the bootstrap.

    Raises:
        RecordError: items that are missing, damaged, fewer than two, or not the same in both; no such metric.
    """
    if task == "fidelity":
        _validate_trajectories(a, b)
    columns = (_columns(a, task), _columns(b, task))
    return _difference((a, b), columns, metric, filter_name, resamples, seed)


def _columns(record: Path, task: str) -> TaskColumns:
    columns = read_columns(items_folder(record))
    if task not in columns:
        raise RecordError(f"{items_folder(record) / task}.jsonl: items cannot be read, there are none")
    return columns[task]


def shared(a: Path, b: Path) -> list[tuple[str, str, str, PairedInterval]]:
    """Return (task, metric, filter, interval) for all that both records have items of.

    Raises:
        RecordError: as `compare`; records that share no task.
    """
    left_tasks, right_tasks = (read_columns(items_folder(path)) for path in (a, b))
    tasks = [task for task in sorted(left_tasks) if task in right_tasks]
    if not tasks:
        raise RecordError(f"{items_folder(a)} and {items_folder(b)}: hold items of no common task")
    rows = []
    if "fidelity" in tasks:
        _validate_trajectories(a, b)
    for task in tasks:
        left, right = left_tasks[task], right_tasks[task]
        for metric, _, name in (key.rpartition(",") for key in left.values if key in right.values):
            rows.append((task, metric, name, _difference((a, b), (left, right), metric, name, 2000, 0)))
    return rows


def _validate_trajectories(a: Path, b: Path) -> None:
    """Refuse fidelity of other models, precisions or trajectories."""
    left, right = (trajectories_of(read_record(path).spec) for path in (a, b))
    for name, setting in left.items():
        if setting != right[name]:
            raise RecordError(
                f"{a} and {b}: {name} differs ({setting} and {right[name]}); their fidelity is of other states"
            )


def _difference(
    records: tuple[Path, Path],
    columns: tuple[TaskColumns, TaskColumns],
    metric: str,
    filter_name: str | None,
    resamples: int,
    seed: int,
) -> PairedInterval:
    left, right = (
        side.values[_key(path, side, metric, filter_name)] for path, side in zip(records, columns, strict=True)
    )
    if columns[0].items != columns[1].items:
        raise RecordError(
            f"{records[0]} and {records[1]}: their items of {metric} differ ({len(left)} and {len(right)}; one has "
            "others, or another document under the same number)"
        )
    if len(left) < 2:
        raise RecordError(f"{records[0]}: {len(left)} item of {metric}; an interval needs two or more")
    return paired_bootstrap(left, right, resamples, seed)


def _key(path: Path, columns: TaskColumns, metric: str, filter_name: str | None) -> str:
    known = [key.rpartition(",")[::2] for key in columns.values]
    filters = [name for known_metric, name in known if known_metric == metric and filter_name in (None, name)]
    if len(filters) != 1:
        got = metric if filter_name is None else f"{metric} ({filter_name})"
        problem = "has several filters, name one" if filters else "has no numbers"
        raise RecordError(f"{path}: {got} {problem}; there are {', '.join(f'{m} ({f})' for m, f in known)}")
    return f"{metric},{filters[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every shared metric's difference A - B; returns 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m starquant.reports.paired", description=main.__doc__)
    parser.add_argument("a", type=Path, help="a record, NAME.json, with NAME.items beside it")
    parser.add_argument("b", type=Path, help="the record it is compared with")
    options = parser.parse_args(arguments)
    try:
        validate_speed({path: read_record(path).spec for path in (options.a, options.b)})
        rows = shared(options.a, options.b)
    except StarquantError as error:
        print(error, file=sys.stderr)
        return 2
    cells = [HEADER, *(_cells(*row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    for row in cells:
        print("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
    return 0


def _cells(task: str, metric: str, filter_name: str, interval: PairedInterval) -> tuple[str, ...]:
    name = metric if filter_name == "none" else f"{metric} ({filter_name})"
    numbers = (interval.mean, interval.low, interval.high)
    return (task, name, str(interval.n), *(f"{x:+.4g}" for x in numbers), f"{interval.across_zero:.3f}")


if __name__ == "__main__":
    sys.exit(main())
