"""What an experiment shows once its sweep is through: its tables, figures and page, printed and written."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from starquant.errors import ConfigError, RecordError
from starquant.reports.choice import GRID, LIMIT, in_words
from starquant.reports.definitions import FIGURES, SEED_TABLES, TABLES
from starquant.reports.experiments import GRID_TABLES, NAMES, build, stem_of
from starquant.reports.page.experiment import PAGES, show_page
from starquant.reports.selection import Results


def _has_cut(name: str, results: Results, limit: int) -> bool:
    """Return whether runs of so many items belong to a table or figure; the others of a sweep may not."""
    definition = {**TABLES, **SEED_TABLES, **FIGURES}.get(name)
    rows = [] if definition is None else [row.where for row in definition.rows]
    return any(run.get(LIMIT) == limit and any(run.matches(row) for row in rows) for run in results.runs)


def after_sweep(name: str, results: Path, limit: int | None = None, made: Collection[str] = ()) -> bool:
    """Build what an experiment shows once its cells are there, and print where it lies.

    A sweep over both grids gets a table of each.

    Args:
        name: of the experiment.
        results: its folder.
        limit: items a task that every cell was held to, None for all.
        made: file names of the records of the sweep.

    Returns:
        Whether it was built of all records; True where there is nothing to build.
    """
    if name not in NAMES:
        return True
    read = Results(results)
    where: dict[str, Any] = {}
    try:
        cut: dict[str, Any] = {LIMIT: limit} if limit is not None and _has_cut(name, read, limit) else {}
        for where in [cut | of_grid for of_grid in _grids(name, read, made)]:
            _show(name, build(name, read, results, where=where, made=made))
            show_page(name, read, where, results / PAGES / f"{stem_of(name, where)}.html")
    except (ConfigError, RecordError) as error:
        again = ["starquant tables", name, "--records", shlex.quote(str(results))]
        again += [in_words(key, value) for key, value in where.items()]
        print(f"error: {name} was not built: {error} ({' '.join(again)})", file=sys.stderr)
        return False
    return not read.faults


def _grids(name: str, results: Results, made: Collection[str]) -> list[dict[str, Any]]:
    """Return the conditions of a table a grid that a sweep's records are on; none where they are the authors'."""
    if name not in GRID_TABLES:
        return [{}]
    grids = {run.grid for run in results.runs if run.path.name in made}
    return ([] if "authors" not in grids and "common" in grids else [{}]) + [{GRID: "common"}] * ("common" in grids)


def _show(name: str, paths: Sequence[Path]) -> None:
    if name in {*TABLES, *SEED_TABLES}:
        print("\n" + paths[0].read_text(encoding="utf-8"))
    print("\n".join(f"wrote {path}" for path in paths), flush=True)
