"""All that a page shows of a folder of records, as plain data and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from starquant.errors import ConfigError, RecordError
from starquant.reports.choice import Where, taken
from starquant.reports.definitions import FIGURES, SEED_TABLES, TABLES, Definition
from starquant.reports.page.activations import densities
from starquant.reports.page.charts import charts
from starquant.reports.page.fidelity import along_steps, by_mask_ratio
from starquant.reports.page.flips import flips
from starquant.reports.page.provenance import HEADER, provenance, sqnr
from starquant.reports.page.rows import missing, rows_of
from starquant.reports.page.table import columns_of, comparison
from starquant.reports.selection import Results, validate_speed

#: Experiments whose rows a page can have.
EXPERIMENTS: dict[str, Definition] = {**TABLES, **SEED_TABLES, **FIGURES}


@dataclass(frozen=True)
class Content:
    """What a page shows.

    Attributes:
        title: of the experiment, or the folder's name.
        table: of `table.comparison`, with `reference`: the row that the others are compared with first.
        flips: of `flips.flips`.
        charts: Vega-Lite by place; none where altair is not installed.
        provenance: a header and a line a record.
        paper: the paper's figures, a header and lines; empty where it has none.
        notes: what is missing, was refused, or must be known, by heading.
    """

    title: str
    table: dict[str, Any]
    flips: list[dict[str, Any]]
    charts: dict[str, dict[str, Any]]
    provenance: list[list[str]]
    paper: list[list[str]] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)


def content_of(
    results: Results, experiment: str | None = None, where: Where | None = None, title: str | None = None
) -> Content:
    """Return what a page shows of the records below a folder.

    Args:
        results: the folder; damaged records are left out, and named on the page.
        experiment: of `EXPERIMENTS`: its rows by their labels; None for every record.
        where: dotted configuration keys and values that records must have; None takes runs of some items as well.
        title: of the page; None for the experiment's, or the folder's name.

    Raises:
        ConfigError: a value that no record has.
        RecordError: no folder, no record.
    """
    definition = None if experiment is None else EXPERIMENTS[experiment]
    runs, refused, notes = results.runs, list[str](), list[str]()
    if definition is not None:
        wanted = [row.where for row in definition.rows]
        runs = taken(results, runs, where or {}, definition.name, lambda run: any(run.matches(row) for row in wanted))
    elif where:
        runs = taken(results, runs, where)
    if not runs:
        raise RecordError(f"{results}: holds no record" + ("" if experiment is None else f" of {experiment}"))
    try:
        validate_speed({run.path: run.record.spec for run in runs})
    except RecordError as error:
        notes.append(f"{error}: their rows are not to be compared")
    rows = rows_of(runs, definition, refused)
    shown = columns_of(rows)
    table = comparison(rows, shown)
    table["reference"] = _reference(table["rows"], definition)
    notes += _known(runs) + [f"no paired difference: {why}" for why in table.pop("unpaired")]
    try:
        shapes = _activations(results, notes) if experiment is None and results.names is None else []
        drawn = charts(rows, table, shown, by_mask_ratio(rows), along_steps(rows), sqnr(rows), shapes)
    except ConfigError as error:
        drawn = {}
        notes.append(str(error))
    lines_by_heading = {
        "Missing": missing(rows, definition),
        "Refused": [*results.faults, *dict.fromkeys(refused)],
        "To be known": notes,
    }
    return Content(
        title=title or (f"Records in {results.folder.name or results}" if definition is None else definition.title),
        table=table,
        flips=flips(rows),
        charts=drawn,
        provenance=[[*HEADER], *provenance(rows)],
        paper=_paper(definition),
        notes={heading: lines for heading, lines in lines_by_heading.items() if lines},
    )


def _reference(rows: Sequence[dict[str, Any]], definition: Definition | None) -> int:
    """Return the row that others are compared with first: the experiment's, else full precision, else the first."""
    against = None if definition is None else definition.against
    named = [index for index, row in enumerate(rows) if row["label"] == against]
    return (named or [index for index, row in enumerate(rows) if row["full"]] or [0])[0]


def _activations(results: Results, notes: list[str]) -> list[dict[str, Any]]:
    try:
        return densities(results.folder)
    except RecordError as error:
        notes.append(str(error))
        return []


def _known(runs: Sequence[Any]) -> list[str]:
    lines = []
    dirty = [run for run in runs if run.record.provenance.get("git_dirty") is not False]
    unsealed = sum(run.record.seal is None for run in runs)
    limits = sorted({run.get("tasks.limit") for run in runs} - {None})
    if dirty:
        lines.append(f"{len(dirty)} of {len(runs)} records are of code that was not committed: no claim rests on them")
    if unsealed:
        lines.append(f"{unsealed} of {len(runs)} records have no seal: whether they were changed cannot be told")
    if limits:
        lines.append(f"some rows are of the first {', '.join(map(str, limits))} items of each task only")
    return lines


def _paper(definition: Definition | None) -> list[list[str]]:
    """Return the paper's figures of an experiment as text, its header first."""
    path: Path | None = None if definition is None else definition.paper
    if path is None:
        return []
    frame = pd.read_csv(path, dtype=str).fillna("")
    return [[*map(str, frame.columns)], *([*map(str, line)] for line in frame.itertuples(index=False))]
