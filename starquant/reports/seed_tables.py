"""An experiment's table over rotation seeds: fidelity of every method at every bit-width, and differences to one.

Rows are `definitions.SEED_TABLES`; means, standard errors and paired intervals are `across_seeds`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from starquant.errors import RecordError
from starquant.reports import figures
from starquant.reports.across_seeds import add_run, table, warning_of
from starquant.reports.choice import rank_of
from starquant.reports.comparison import markdown
from starquant.reports.definitions import Definition
from starquant.reports.run import Run
from starquant.reports.samples import Column, Row
from starquant.reports.selection import validate_together
from starquant.store.files import write_atomically

COLUMNS: tuple[Column, ...] = tuple(
    (f"fidelity_{group}", metric) for group in ("text", "tasks") for metric in ("kl", "top1_agreement")
)
NOTES = (
    "text: held-out natural text; tasks: answers of held-out items. KL in nats, top-1 agreement in percent "
    "(differences in points), standard errors in parentheses; differences are paired by rotation seed and item, "
    "brackets are 95 % bootstrap intervals over both."
)


def seed_rows(
    definition: Definition, runs: Sequence[Run], allow: Sequence[str] = (), made: Collection[str] = ()
) -> list[Row]:
    """Return a row for each bit-width and method that was run, in the order of the definition.

    Args:
        definition: of the table.
        runs: its own are chosen among these.
        allow: what `selection.ALLOWED` names.
        made: file names of records that come first where others compete for a row.

    Raises:
        RecordError: no run of the table, two of the same seeds, runs that do not go together.
    """
    own = [run for run in runs if any(run.matches(row.where) for row in definition.rows)]
    if not own:
        raise RecordError(f"holds no record of {definition.name}")
    validate_together(own, allow)
    rows, rank = [], rank_of(definition.name, made)
    for bits in sorted({str(run.get("bits.name")) for run in own}):
        for wanted in definition.rows:
            row = Row((bits, wanted.label))
            for run in own:
                if run.get("bits.name") == bits and run.matches(wanted.where):
                    add_run(row, run, rank)
            rows += [row] if row.runs else []
    return rows


def frames(definition: Definition, rows: Sequence[Row]) -> dict[str, pd.DataFrame]:
    """Return the table of values and one of differences to each row that others are compared with, where it was run."""
    frame_by_heading = {"values": table(rows, None, COLUMNS)}
    for against in (definition.against, *definition.also_against):
        if any(row.label[-1] == against for row in rows):
            frame_by_heading[f"against {against}"] = table(rows, against, COLUMNS)
    return frame_by_heading


def write(definition: Definition, rows: Sequence[Row], out: Path) -> list[Path]:
    """Write tables/NAME.md and .csv, figures/NAME.png and .pdf; returns the paths."""
    tables = frames(definition, rows)
    parts = [f"# {definition.title}"]
    parts += [f"## {heading}\n\n{markdown(frame)}" for heading, frame in tables.items()]
    paths = [out / "tables" / f"{definition.name}{suffix}" for suffix in (".md", ".csv")]
    write_atomically(paths[0], "\n\n".join([*parts, NOTES, *([note] if (note := warning_of(rows)) else [])]) + "\n")
    write_atomically(paths[1], tables["values"].to_csv(index=False, lineterminator="\n"))
    (out / "figures").mkdir(parents=True, exist_ok=True)
    return paths + figures.save(figures.divergence(rows), out / "figures" / definition.name)
