"""Two runs on the same items: the paired difference of a metric and its bootstrap interval.

    starquant compare A.json B.json
    starquant compare rtn-testbed quarot-testbed --records results      parts of their names that no other record has

Items lie beside a record: A.items/TASK.jsonl. They are paired by document (fidelity: by prompt, over whose rows
the metric is averaged).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from starquant.errors import CommandParser, ConfigError, RecordError, one_line_errors, path_of, user_path
from starquant.reports.run import Run
from starquant.reports.selection import validate_speed
from starquant.reports.text import aligned
from starquant.statistics.bootstrap import PairedInterval, paired_bootstrap
from starquant.store.compact import RECORDS
from starquant.store.items import items_folder, trajectories_of
from starquant.store.source import read_file, record_paths

HEADER = ("task", "metric", "n", "difference", "low", "high", "across zero")


def shared(a: Path | Run, b: Path | Run) -> list[tuple[str, str, str, PairedInterval]]:
    """Return (task, metric, filter, interval) for all that both records have items of.

    Raises:
        RecordError: records or items that are damaged, items that are fewer than two or not the same in both; records
            that share no task or no metric.
    """
    left, right = (run if isinstance(run, Run) else Run.read(run) for run in (a, b))
    tasks = [task for task in sorted(left.items) if task in right.items]
    if not tasks:
        raise RecordError(f"{_named(left, right, items_folder)}: hold items of no common task")
    rows = []
    _validate_documents(left, right)
    if "fidelity" in tasks:
        _validate_trajectories(left, right)
    for task in tasks:
        for key in (key for key in left.items[task].values if key in right.items[task].values):
            metric, _, name = key.rpartition(",")
            rows.append((task, metric, name, _difference(left, right, task, key)))
    if not rows:
        raise RecordError(f"{_named(left, right, items_folder)}: hold no common metric of {', '.join(tasks)}")
    return rows


def _named(a: Run, b: Run, of: Callable[[Path], Path] = lambda path: path) -> str:
    return f"{of(a.path)} and {of(b.path)}"


def _validate_documents(a: Run, b: Run) -> None:
    """Refuse records whose items, or examples in front of them, were read of the hub as others."""
    left, right = (run.record.provenance.get("documents") or {} for run in (a, b))
    other = [leaf for leaf in left if leaf in right and left[leaf] != right[leaf]]
    if other:
        raise RecordError(f"{_named(a, b)}: their items of {', '.join(other)} differ, or the examples in front of them")


def _validate_trajectories(a: Run, b: Run) -> None:
    """Refuse fidelity of other models, precisions or trajectories."""
    left, right = (trajectories_of(run.record.spec) for run in (a, b))
    for name, setting in left.items():
        if setting != right[name]:
            raise RecordError(
                f"{_named(a, b)}: {name} differs ({setting} and {right[name]}); their fidelity is of other states"
            )


def _difference(a: Run, b: Run, task: str, key: str) -> PairedInterval:
    columns, metric = (a.items[task], b.items[task]), key.rpartition(",")[0]
    left, right = (side.values[key] for side in columns)
    if columns[0].items != columns[1].items:
        raise RecordError(
            f"{_named(a, b)}: their items of {metric} differ ({len(left)} and {len(right)}; one has "
            "others, or another document under the same number)"
        )
    if len(left) < 2:
        raise RecordError(f"{a.path}: {len(left)} item of {metric}; an interval needs two or more")
    return paired_bootstrap(left, right)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print every shared metric's difference A - B; returns 2 after bad input."""
    parser = CommandParser(
        prog="starquant compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", help="a record, NAME.json, with NAME.items beside it, or a part of a name")
    parser.add_argument("b", help="the record it is compared with")
    parser.add_argument("--records", type=user_path, default=Path("results"), help="where names are looked up")
    options = parser.parse_args(arguments)
    a, b = (Run.read(record_named(word, options.records)) for word in (options.a, options.b))
    validate_speed({run.path: run.record.spec for run in (a, b)})
    rows = shared(a, b)
    print("\n".join(aligned([HEADER, *(_cells(*row) for row in rows)])))
    return 0


def record_named(word: str, records: Path) -> Path:
    """Return the record that a path, its digest or a part of its name stands for.

    Args:
        word: of the command line.
        records: folder of results, where it is looked up unless it is a file.

    Raises:
        ConfigError: a word that can be neither, a folder that is none.
        RecordError: a name that no record has, or several have; compact records that cannot be read.
    """
    path = path_of(word, "compare")
    if path.is_file() or path.suffix == ".json":
        return path
    if not records.is_dir():
        raise ConfigError(f"--records: {records}: no such folder, and '{word}' is no file; allowed: a results folder")
    known = [*record_paths(records)]
    if not known:
        raise RecordError(f"{records}: holds no record, and '{word}' is no file")
    named = [record for record in known if word in record.stem]
    if len(named) == 1:
        return named[0]
    if named:
        shown = ", ".join(record.stem for record in named[:4]) + (", ..." if len(named) > 4 else "")
        raise RecordError(f"{word}: {len(named)} records in {records} have that in their names: {shown}")
    for path in known:
        if path.name == RECORDS:  # a compact form whose records cannot be named: say why
            read_file(path)
    allowed = ", ".join(record.stem for record in known[:4]) + (", ..." if len(known) > 4 else "")
    raise RecordError(f"{word}: no record in {records} has that in its name; allowed: a file, a part of {allowed}")


def _cells(task: str, metric: str, filter_name: str, interval: PairedInterval) -> tuple[str, ...]:
    name = metric if filter_name == "none" else f"{metric} ({filter_name})"
    numbers = (interval.mean, interval.low, interval.high)
    return (task, name, str(interval.n), *(f"{x:+.4g}" for x in numbers), f"{interval.across_zero:.3f}")


if __name__ == "__main__":
    sys.exit(main())
