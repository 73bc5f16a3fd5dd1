"""From records to what an experiment shows: its table in three formats, or its figure in two."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from starquant.errors import ConfigError, RecordError
from starquant.reports.assembly import Section, assemble
from starquant.reports.choice import LIMIT, Where, conflict, differences, in_words, rank_of, taken
from starquant.reports.definitions import ACTIVATIONS, FIGURES, SEED_TABLES, TABLES, TRAJECTORIES, Definition
from starquant.reports.selection import Results, Run, one_a_seed, validate_together
from starquant.reports.writing import grid, write
from starquant.store.items import trajectories_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = (*TABLES, *SEED_TABLES, *FIGURES, ACTIVATIONS)


def table(
    name: str,
    records: Path | Results,
    allow: Sequence[str] = (),
    where: dict[str, Any] | None = None,
    made: Collection[str] = (),
) -> list[Section]:
    """Return the sections of a table.

    Args:
        name: of the experiment.
        records: folder of results, or what was read of it for other tables.
        allow: what `selection.ALLOWED` names.
        where: dotted configuration keys and values that records must have, beside those of the table; without
            `tasks.limit` among them records of all items alone are taken.
        made: file names of records that come first where others compete for a row.

    Raises:
        ConfigError: no such table, a value that no record has.
        RecordError: no record of it, damaged ones, ones that do not go together.
    """
    if name not in TABLES:
        raise ConfigError(f"got '{name}', allowed: {', '.join(TABLES)}")
    return assemble(TABLES[name], _chosen(TABLES[name], records, where), allow, made)


def frames(name: str, records: Path, allow: Sequence[str] = ()) -> dict[str, pd.DataFrame]:
    """Return a table as text, one data frame for each model; raises as `table`."""
    frame_by_model = {}
    for section in table(name, records, allow):
        header, *lines = grid(section)
        frame_by_model[section.model] = pd.DataFrame(lines, columns=header).set_index("")
    return frame_by_model


def trajectory_figure(
    records: Path | Results, allow: Sequence[str] = (), where: dict[str, Any] | None = None
) -> Figure:
    """Return figure 3 drawn from records; raises RecordError where there are none, or they do not go together."""
    return _drawn(TRAJECTORIES, records, allow, where)


def _drawn(
    definition: Definition, records: Path | Results, allow: Sequence[str], where: dict[str, Any] | None
) -> Figure:
    from starquant.reports import figures

    lines = _lines(definition, records, allow, where)
    figure: Figure = getattr(figures, str(definition.draw))([(label, run.path) for label, run in lines])
    return figure


def _lines(
    definition: Definition, records: Path | Results, allow: Sequence[str], where: dict[str, Any] | None
) -> list[tuple[str, Run]]:
    """Return a figure's runs, of fidelity, with the labels of their lines; raises as `trajectory_figure`."""
    runs = [run for run in _chosen(definition, records, where) if run.get("fidelity.source") is not None]
    lines: list[tuple[str, Run]] = []
    for row in definition.rows:
        own = [run for run in runs if run.matches(row.where)]
        own = [run for run in own if not run.get("tasks.names")] or own  # the tables' runs follow trajectories as well
        lines += [(row.label, run) for run in one_a_seed(row.label, own, rank_of(definition.name)).values()]
    if not lines:
        raise RecordError(f"{records}: holds no record of {definition.name}")
    models = sorted({str(run.get("model.name")) for _, run in lines})
    if len(models) > 1:
        raise RecordError(f"{records}: holds records of {', '.join(models)}; choose by --where model.name={models[0]}")
    validate_together([run for _, run in lines], allow)
    trajectories: dict[Any, tuple[dict[str, Any], Run]] = {}
    for _, run in lines:
        expected, first = trajectories.setdefault(run.get("model.seed"), (trajectories_of(run.record.spec), run))
        if expected != trajectories_of(run.record.spec):
            keys = [key for key in differences(first, run) if key.startswith(("fidelity.", "model."))]
            raise RecordError(
                f"{first.path.name} and {run.path.name}: follow other trajectories; {conflict(first, run, keys)}"
            )
    return lines


def reports(records: Path) -> list[dict[str, Any]]:
    """Return the reports of activations below a results folder; raises RecordError where there are none."""
    from starquant.reports.figures import read_report

    paths = sorted((records / "activations").glob("*.json"))
    if not paths:
        raise RecordError(f"{records / 'activations'}: holds no report; run experiment=figure1_activations")
    return [read_report(path) for path in paths]


def _chosen(definition: Definition, records: Path | Results, where: Where | None) -> list[Run]:
    """Return the runs of a table or figure; raises as `choice.taken`."""
    rows = [row.where for row in definition.rows]
    return taken(
        records,
        Results.of(records).runs,
        where or {},
        definition.name,
        lambda run: any(run.matches(row) for row in rows),
    )


def build(
    name: str,
    results: Path | Results,
    out: Path,
    allow: Sequence[str] = (),
    where: dict[str, Any] | None = None,
    made: Collection[str] = (),
) -> list[Path]:
    """Write a table or figure; returns the paths. What it cannot replace of an earlier time is set aside (NAME.stale).

    Args:
        name: of the experiment.
        results: folder of results, or what was read of it for other tables.
        out: where `tables/` and `figures/` are written.
        allow: what `selection.ALLOWED` names.
        where: as in `table`.
        made: file names of records that come first where others compete for a row.

    Raises:
        ConfigError: no such table or figure.
        RecordError: as `table`.
    """
    if name not in NAMES:
        raise ConfigError(f"got '{name}', allowed: {', '.join(NAMES)}")
    results = Results.of(results)
    try:
        paths = _written(name, results, out, allow, where, made)
    except RecordError as error:
        aside = set_stale_aside(name, out) if results.folder.is_dir() else []
        if not aside:
            raise
        raise RecordError(f"{error}; set aside as NAME.stale: {', '.join(path.name for path in aside)}") from None
    set_stale_aside(name, out, paths)
    return paths


def set_stale_aside(name: str, out: Path, new: Sequence[Path] = ()) -> list[Path]:
    """Rename what an experiment showed once, but for new files, to NAME.stale; returns what it was called."""
    files = [out / "tables" / f"{name}{suffix}" for suffix in (".md", ".tex", ".csv")]
    patterns = [f"{name}{more}{suffix}" for more in ("", "-*") for suffix in (".png", ".pdf")]
    files += [path for pattern in patterns for path in sorted((out / "figures").glob(pattern))]
    stale = [path for path in files if path not in new and path.is_file()]
    for path in stale:
        path.replace(path.with_name(f"{path.name}.stale"))
    return stale


def _written(
    name: str,
    results: Results,
    out: Path,
    allow: Sequence[str],
    where: dict[str, Any] | None,
    made: Collection[str],
) -> list[Path]:
    if name in TABLES:
        sections = table(name, results, allow, where, made)
        if not any(runs for section in sections for _, runs, _ in section.rows):
            raise RecordError(f"{results}: holds no record of {name}")
        return write(TABLES[name], sections, out / "tables")
    if name in SEED_TABLES:
        from starquant.reports import seed_tables

        rows = seed_tables.seed_rows(SEED_TABLES[name], _chosen(SEED_TABLES[name], results, where), allow)
        return seed_tables.write(SEED_TABLES[name], rows, out)
    return _figure(name, results, out / "figures", allow, where)


def _figure(name: str, results: Results, out: Path, allow: Sequence[str], where: dict[str, Any] | None) -> list[Path]:
    from starquant.reports import figures

    if name in FIGURES:
        drawn = [(name, _drawn(FIGURES[name], results, allow, where))]
    else:
        drawn = [
            (f"{name}-{report['name']}-{site}", figures.activations(report, site))
            for report in reports(results.folder)
            for site in dict.fromkeys(row["site"] for row in report["rows"])
        ]
    out.mkdir(parents=True, exist_ok=True)
    return [path for stem, figure in drawn for path in figures.save(figure, out / stem)]


def _has_cut(name: str, results: Results, limit: int) -> bool:
    """Return whether runs of so many items belong to a table or figure; the others of a sweep may not."""
    definition = {**TABLES, **SEED_TABLES, **FIGURES}.get(name)
    rows = [] if definition is None else [row.where for row in definition.rows]
    return any(run.get(LIMIT) == limit and any(run.matches(row) for row in rows) for run in results.runs)


def after_sweep(name: str, results: Path, limit: int | None = None, made: Collection[str] = ()) -> bool:
    """Build what an experiment shows once its cells are there, and print where it lies.

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
        where = {LIMIT: limit} if limit is not None and _has_cut(name, read, limit) else {}
        paths = build(name, read, results, where=where, made=made)
    except (ConfigError, RecordError) as error:
        again = ["python -m starquant tables", name, "--records", shlex.quote(str(results))]
        again += [in_words(key, value) for key, value in where.items()]
        print(f"error: {name} was not built: {error} ({' '.join(again)})", file=sys.stderr)
        return False
    if name in TABLES or name in SEED_TABLES:
        print("\n" + paths[0].read_text(encoding="utf-8"))
    print("\n".join(f"wrote {path}" for path in paths), flush=True)
    return not read.faults
