"""From records to what an experiment shows: its table in three formats, or its figure in two."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from starquant.errors import ConfigError, RecordError, nearest
from starquant.reports.assembly import Section, assemble
from starquant.reports.choice import GRID, Where, conflict, differences, grid_of, rank_of, taken
from starquant.reports.definitions import ACTIVATIONS, FIGURES, SEED_TABLES, TABLES, TRAJECTORIES, Definition
from starquant.reports.page.experiment import PAGES
from starquant.reports.run import Run
from starquant.reports.selection import Results, one_a_seed, validate_together
from starquant.reports.writing import text_frame, write
from starquant.store.items import trajectories_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID_TABLES, COMMON_GRID = {d.name for d in (*TABLES.values(), *SEED_TABLES.values()) if not d.grids}, "_common_grid"
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
    return {section.model: text_frame(section).set_index("") for section in table(name, records, allow)}


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
        raise ConfigError(f"got '{name}', allowed: {', '.join(NAMES)}.{nearest(name, NAMES)}")
    results = Results.of(results)
    try:
        paths = _written(name, results, out, allow, where, made)
    except RecordError as error:
        aside = set_stale_aside(stem_of(name, where), out) if results.folder.is_dir() else []
        if not aside:
            raise
        raise RecordError(f"{error}; set aside as NAME.stale: {', '.join(path.name for path in aside)}") from None
    set_stale_aside(stem_of(name, where), out, paths)
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


def set_all_aside(name: str, out: Path) -> list[Path]:
    """Rename whatever an experiment showed, on either grid; as `set_stale_aside`."""
    stems = (name, f"{name}{COMMON_GRID}")
    pages = [path for stem in stems if (path := out / PAGES / f"{stem}.html").is_file()]
    for path in pages:
        path.replace(path.with_name(f"{path.name}.stale"))
    return [path for stem in stems for path in set_stale_aside(stem, out)] + pages


def _written(
    name: str,
    results: Results,
    out: Path,
    allow: Sequence[str],
    where: dict[str, Any] | None,
    made: Collection[str],
) -> list[Path]:
    if name in TABLES:
        runs = _chosen(TABLES[name], results, where)
        sections = assemble(TABLES[name], runs, allow, made)
        if not any(runs for section in sections for _, runs, _ in section.rows):
            raise RecordError(f"{results}: holds no record of {name}")
        return write(_on_grid(TABLES[name], runs, where), sections, out / "tables")
    if name in SEED_TABLES:
        from starquant.reports import seed_tables

        runs = _chosen(SEED_TABLES[name], results, where)
        rows = seed_tables.seed_rows(SEED_TABLES[name], runs, allow, made)
        return seed_tables.write(_on_grid(SEED_TABLES[name], runs, where), rows, out)
    return _figure(name, results, out / "figures", allow, where)


def _on_grid(definition: Definition, runs: Sequence[Run], where: Where | None) -> Definition:
    """Return a table that says in its title whose grids its runs are on; one of the common grid has its own files."""
    of_grid = {"authors": "each method on its authors' grid", "common": "one grid for all methods", None: ""}
    words = of_grid[grid_of(runs)]
    title = f"{definition.title}; {words}" if words else definition.title
    return dataclasses.replace(definition, name=stem_of(definition.name, where), title=title)


def stem_of(name: str, where: Where | None) -> str:
    """Return what the files of a table or figure are called: a table of the common grid stands beside the authors'."""
    of_common = name in GRID_TABLES and (where or {}).get(GRID) == "common"
    return f"{name}{COMMON_GRID}" if of_common else name


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
