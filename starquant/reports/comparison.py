"""One Markdown table of many records: a row a method and bit-width, a column a task or fidelity metric.

`python -m starquant.reports.comparison results/records` prints it; standard errors in parentheses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from starquant.errors import RecordError, one_line_errors, user_path
from starquant.reports.choice import conditions, conflict, differences, taken
from starquant.reports.frame import scores_frame
from starquant.reports.run import Run
from starquant.reports.selection import read_runs
from starquant.reports.text import markdown_table
from starquant.store.items import FIDELITY, is_fidelity

ROW = ["model", "bits", "method", "seed"]
FIDELITY_COLUMNS = ("kl", "top1_agreement", "commit_flips", "hidden_mse")


def column_name(task: str, metric: str) -> str:
    """Return what a column is called: of fidelity the metric (and the group of texts), of a task both."""
    if is_fidelity(task):
        group = task.removeprefix(FIDELITY).removeprefix("_")
        return f"{metric} ({group})" if group else metric
    return f"{task.removeprefix('testbed_').removeprefix('smol_')} {metric}"


def comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """Return cells as text, "value (stderr)": fractions in percent, nats and relative errors as they are.

    Args:
        frame: of `scores_frame`; subjects of groups and mask-ratio bins are left out.

    Raises:
        RecordError: two records of the same row, which only a digest tells apart.
    """
    repeated = frame.groupby(ROW)["digest"].nunique()
    if (repeated > 1).any():
        row = ", ".join(map(str, repeated[repeated > 1].index[0]))
        raise RecordError(
            f"{row}: several records share this row; give a folder with one of each, "
            "or compare seeds with starquant.reports.across_seeds"
        )
    of_fidelity = pd.Series([is_fidelity(task) for task in frame["task"]], frame.index, dtype=bool)
    shown = (frame["filter"] == "all") & frame["metric"].isin(FIDELITY_COLUMNS)
    chosen = frame[(of_fidelity & shown) | (~of_fidelity & frame["requested"])]
    names = pd.Series(map(column_name, chosen["task"], chosen["metric"]), chosen.index, dtype=object)
    cells = chosen.assign(column=names, cell=[_cell(row) for row in chosen.itertuples()])
    table = cells.pivot_table(index=ROW, columns="column", values="cell", aggfunc="first", sort=False)
    sizes = chosen.groupby(ROW, sort=False)["n"].agg(lambda n: "-".join(map(str, sorted({n.min(), n.max()}))))
    return table[list(dict.fromkeys(names))].fillna("").assign(n=sizes).reset_index()


def _cell(row: object) -> str:
    value, stderr, unit = (getattr(row, name) for name in ("value", "stderr", "unit"))
    if unit == "fraction":
        return f"{100 * value:.1f}" + ("" if pd.isna(stderr) else f" ({100 * stderr:.1f})")
    return f"{value:.3g}" + ("" if pd.isna(stderr) else f" ({stderr:.1g})")


def markdown(table: pd.DataFrame) -> str:
    """Return a GitHub table; columns that say the same in every row are left out."""
    constant = [name for name in ("model", "seed") if name in table and table[name].nunique() == 1]
    return markdown_table(table.drop(columns=constant))


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table; returns 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m starquant.reports.comparison", description=__doc__)
    parser.add_argument("folder", type=user_path, help="folder of records")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only records that have this")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder of records")
    runs = taken(folder, read_runs(folder), conditions(options.where))
    if not runs:
        raise RecordError(f"{folder}: holds no record")
    frame = scores_frame(runs)
    validate_rows(runs)
    print(markdown(comparison(frame)))
    return 0


def validate_rows(runs: Sequence[Run]) -> None:
    """Raise RecordError for two records of one row, with what chooses one of them."""
    first: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        row = tuple(run.get(key) for key in ("model.name", "bits.name", "method.name", "seed"))
        other = first.setdefault(row, run)
        if differ := differences(other, run):
            raise RecordError(
                f"{', '.join(map(str, row))}: several records share this row: {other.path.name} and "
                f"{run.path.name}; {conflict(other, run, differ)} (reports.across_seeds compares seeds)"
            )


if __name__ == "__main__":
    sys.exit(main())
