"""From records to what an experiment shows: its table in three formats, or its figure in two."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starquant.errors import ConfigError, RecordError
from starquant.tables.assembly import Section, assemble
from starquant.tables.definitions import FIGURES, TABLES, TRAJECTORIES
from starquant.tables.selection import Run, read_runs, refuse_mixture
from starquant.tables.writing import markdown, write

NAMES = (*TABLES, *FIGURES)


def table(name: str, records: Path, allow: Sequence[str] = (), where: dict[str, Any] | None = None) -> list[Section]:
    """Return the sections of a table.

    Args:
        name: of the experiment.
        records: folder of records.
        allow: what `selection.ALLOWED` names.
        where: dotted configuration keys and values that records must have, beside those of the table.

    Raises:
        ConfigError: no such table.
        RecordError: no record of it, damaged ones, ones that do not go together.
    """
    if name not in TABLES:
        raise ConfigError(f"got '{name}', allowed: {', '.join(TABLES)}")
    return assemble(TABLES[name], _chosen(records, where), allow)


def _chosen(records: Path, where: dict[str, Any] | None) -> list[Run]:
    return [run for run in read_runs(records) if run.matches(where or {}) or run.get("method.name") == "none"]


def build(
    name: str,
    results: Path,
    out: Path,
    allow: Sequence[str] = (),
    where: dict[str, Any] | None = None,
) -> list[Path]:
    """Write a table or figure; returns the paths.

    Raises:
        ConfigError: no such table or figure.
        RecordError: as `table`.
    """
    if name not in NAMES:
        raise ConfigError(f"got '{name}', allowed: {', '.join(NAMES)}")
    if name in TABLES:
        sections = table(name, results, allow, where)
        if not any(runs for section in sections for _, runs, _ in section.rows):
            raise RecordError(f"{results}: holds no record of {name}")
        return write(TABLES[name], sections, out / "tables")
    return _figure(name, results, out / "figures", allow, where)


def _figure(name: str, results: Path, out: Path, allow: Sequence[str], where: dict[str, Any] | None) -> list[Path]:
    from starquant.tables import figures

    out.mkdir(parents=True, exist_ok=True)
    if name == TRAJECTORIES.name:
        runs = [run for run in _chosen(results, where) if run.get("fidelity.source") is not None]
        lines = [(row.label, run) for row in TRAJECTORIES.rows for run in runs if run.matches(row.where)]
        if not lines:
            raise RecordError(f"{results}: holds no record of {name}")
        refuse_mixture([run for _, run in lines], allow)
        figure = figures.trajectory([(label, run.path) for label, run in lines])
        return figures.save(figure, out / name)
    reports = sorted((results / "activations").glob("*.json"))
    if not reports:
        raise RecordError(f"{results / 'activations'}: holds no report; run experiment={name}")
    written = []
    for content in map(figures.read_report, reports):
        for site in dict.fromkeys(row["site"] for row in content["rows"]):
            written += figures.save(figures.activations(content, site), out / f"{name}-{content['name']}-{site}")
    return written


def after_sweep(name: str, results: Path) -> None:
    """Build what an experiment shows once its cells are there, and print where it lies."""
    if name not in NAMES:
        return
    try:
        paths = build(name, results, results)
    except RecordError as error:
        print(f"note: {name} was not built: {error} (python -m starquant.tables {name})", file=sys.stderr)
        return
    if name in TABLES:
        print("\n" + paths[0].read_text(encoding="utf-8"))
    print("\n".join(f"wrote {path}" for path in paths), flush=True)


__all__ = ["NAMES", "after_sweep", "build", "markdown", "table"]
