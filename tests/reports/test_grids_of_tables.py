"""Authors' grids and the common one: a table is on one of them, and says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from starquant.reports.__main__ import main
from starquant.reports.after_sweep import after_sweep
from starquant.reports.experiments import set_all_aside, table
from starquant.reports.run import Run
from starquant.reports.selection import read_runs
from tests.support.records import edit_record
from tests.support.tables import FACTS, put

NAME = "table1_main"


def fill(folder: Path) -> dict[str, Path]:
    put(folder, {FACTS: [1.0] * 4}, "none")
    return {
        "rtn": put(folder, {FACTS: [0.0] * 4}, "rtn"),
        "authors": put(folder, {FACTS: [1.0, 0.0, 1.0, 0.0]}, "smoothquant"),
        "common": put(folder, {FACTS: [0.0, 1.0, 1.0, 1.0]}, "smoothquant", changes={"bits.grid": "common", "seed": 1}),
    }


def of(folder: Path, **where: str) -> dict[str, float]:
    rows = table(NAME, folder, where={"bits.grid": where["grid"]} if where else None)[0].rows
    return {label: cells[FACTS].value for label, _, cells in rows if FACTS in cells}


def test_a_table_is_on_one_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert of(tmp_path) == {"full precision": 100, "RTN": 0, "SmoothQuant": 50}
    assert (
        "1 of 4 records on the common grid left out (--where bits.grid=common takes those)" in capsys.readouterr().err
    )
    assert of(tmp_path, grid="common") == {"full precision": 100, "RTN": 0, "SmoothQuant": 75}


def test_files_and_titles_of_both(tmp_path: Path) -> None:
    fill(tmp_path)
    assert main([NAME, "--records", str(tmp_path)]) == 0
    assert main([NAME, "--records", str(tmp_path), "--where", "bits.grid=common"]) == 0
    titles = {path.stem: path.read_text().splitlines()[0] for path in (tmp_path / "tables").glob("*.md")}
    assert sorted(titles) == [NAME, f"{NAME}_common_grid"]
    assert titles[NAME].endswith("; each method on its authors' grid")
    assert titles[f"{NAME}_common_grid"].endswith("; one grid for all methods")


def test_a_table_that_cannot_be_built_leaves_that_of_the_other_grid(tmp_path: Path) -> None:
    made = fill(tmp_path)
    for words in ([], ["--where", "bits.grid=common"]):
        assert main([NAME, "--records", str(tmp_path), *words]) == 0
    put(tmp_path, {FACTS: [0.0] * 4}, "smoothquant", changes={"bits.grid": "common", "seed": 1, "method.alpha": 0.1})
    assert main([NAME, "--records", str(tmp_path), "--where", "bits.grid=common"]) == 2  # two records of a row
    tables = tmp_path / "tables"
    assert (tables / f"{NAME}.md").exists() and not (tables / f"{NAME}_common_grid.md").exists()
    assert (tables / f"{NAME}_common_grid.md.stale").exists()
    assert made["authors"].exists()
    assert {path.name for path in set_all_aside(NAME, tmp_path)} == {
        f"{NAME}{suffix}" for suffix in (".md", ".tex", ".csv")
    }


def test_a_sweep_over_both_shows_both(tmp_path: Path) -> None:
    made = fill(tmp_path)
    assert after_sweep(NAME, tmp_path, made=[path.name for path in made.values()])
    assert len([*(tmp_path / "tables").glob("*.md")]) == 2
    names = {f"{NAME}.html", f"{NAME}_common_grid.html"}
    assert {path.name for path in (tmp_path / "pages").iterdir()} == names
    assert names < {path.name for path in set_all_aside(NAME, tmp_path)}
    assert {path.suffix for path in (tmp_path / "pages").iterdir()} == {".stale"}


def test_a_sweep_over_the_common_one_shows_that(tmp_path: Path) -> None:
    made = fill(tmp_path)
    assert after_sweep(NAME, tmp_path, made=[made["common"].name])
    assert [path.stem for path in (tmp_path / "tables").glob("*.md")] == [f"{NAME}_common_grid"]


def test_records_that_do_not_say_are_on_the_common_grid(tmp_path: Path) -> None:
    def forget(record: dict) -> None:  # type: ignore[type-arg]
        del record["spec"]["bits"]["grid"], record["spec"]["method"]["authors"]

    for path in (put(tmp_path, {FACTS: [1.0]}, "quarot"), put(tmp_path, {FACTS: [1.0]}, "star_quant")):
        edit_record(path, forget)
    grids = {run.get("method.name"): run.grid for run in read_runs(tmp_path)}
    assert grids == {"quarot": "common", "star_quant": None}
    assert all(isinstance(run, Run) and run.agrees("bits.grid", "common") for run in read_runs(tmp_path))
