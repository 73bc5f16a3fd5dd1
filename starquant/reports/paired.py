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
from starquant.reports.selection import one_speed
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
        _same_trajectories(a, b)
    left, right = (_columns(path, task) for path in (a, b))
    return _difference((a, b), left, right, metric, filter_name, resamples, seed)


def _columns(record: Path, task: str) -> TaskColumns:
    found = read_columns(items_folder(record))
    if task not in found:
        raise RecordError(f"{items_folder(record) / task}.jsonl: items cannot be read, there are none")
    return found[task]


def shared(a: Path, b: Path) -> list[tuple[str, str, str, PairedInterval]]:
    """Return (task, metric, filter, interval) for all that both records have items of.

    Raises:
        RecordError: as `compare`; records that share no task.
    """
    ours, theirs = (read_columns(items_folder(path)) for path in (a, b))
    tasks = [task for task in sorted(ours) if task in theirs]
    if not tasks:
        raise RecordError(f"{items_folder(a)} and {items_folder(b)}: hold items of no common task")
    found = []
    if "fidelity" in tasks:
        _same_trajectories(a, b)
    for task in tasks:
        left, right = ours[task], theirs[task]
        for metric, _, name in (key.rpartition(",") for key in left.values if key in right.values):
            found.append((task, metric, name, _difference((a, b), left, right, metric, name, 2000, 0)))
    return found


def _same_trajectories(a: Path, b: Path) -> None:
    """Refuse fidelity of other models, precisions or trajectories."""
    ours, theirs = (trajectories_of(read_record(path).spec) for path in (a, b))
    for name, left in ours.items():
        if left != theirs[name]:
            raise RecordError(
                f"{a} and {b}: {name} differs ({left} and {theirs[name]}); their fidelity is of other states"
            )


def _difference(
    sides: tuple[Path, Path],
    left: TaskColumns,
    right: TaskColumns,
    metric: str,
    filter_name: str | None,
    resamples: int,
    seed: int,
) -> PairedInterval:
    keys = [_key(path, side, metric, filter_name) for path, side in zip(sides, (left, right), strict=True)]
    ours, theirs = left.values[keys[0]], right.values[keys[1]]
    if left.items != right.items:
        raise RecordError(
            f"{sides[0]} and {sides[1]}: their items of {metric} differ ({len(ours)} and {len(theirs)}; one has "
            "others, or another document under the same number)"
        )
    if len(ours) < 2:
        raise RecordError(f"{sides[0]}: {len(ours)} item of {metric}; an interval needs two or more")
    return paired_bootstrap(ours, theirs, resamples, seed)


def _key(path: Path, columns: TaskColumns, metric: str, asked: str | None) -> str:
    known = [key.rpartition(",")[::2] for key in columns.values]
    filters = [name for found, name in known if found == metric and asked in (None, name)]
    if len(filters) != 1:
        got = metric if asked is None else f"{metric} ({asked})"
        problem = "has several filters, name one" if filters else "has no numbers"
        raise RecordError(f"{path}: {got} {problem}; there are {', '.join(f'{m} ({f})' for m, f in known)}")
    return f"{metric},{filters[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every shared metric's difference A - B; returns 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m starquant.reports.paired", description=main.__doc__)
    parser.add_argument("a", type=Path, help="a record, NAME.json, with NAME.items beside it")
    parser.add_argument("b", type=Path, help="the record it is compared with")
    given = parser.parse_args(arguments)
    try:
        one_speed({path: read_record(path).spec for path in (given.a, given.b)})
        found = shared(given.a, given.b)
    except StarquantError as error:
        print(error, file=sys.stderr)
        return 2
    cells = [HEADER, *(_cells(*row) for row in found)]
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
