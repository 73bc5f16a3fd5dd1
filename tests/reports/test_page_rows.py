"""Rows of a page and their figures: what makes a row, and that its numbers are those of the other tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from starquant.reports import across_seeds
from starquant.reports.definitions import Definition, RowOf
from starquant.reports.page import content as contents
from starquant.reports.page.rows import rows_of
from starquant.reports.selection import read_runs
from tests.support.pages import content, fill, put


def labels(folder: Path, definition: Definition | None = None) -> list[tuple[str, int]]:
    return [(row.name, len(row.runs)) for row in rows_of(read_runs(folder), definition, [])]


def cells(table: dict[str, Any], label: str) -> list[Any]:
    return next(row["cells"] for row in table["rows"] if row["label"] == label)


def test_runs_of_other_seeds_are_a_row_and_full_precision_is_the_first(tmp_path: Path) -> None:
    fill(tmp_path)
    assert labels(tmp_path) == [("full precision", 2), ("w4a4 gptq", 2), ("w4a4 rtn", 2)]


@pytest.mark.parametrize(("method", "seed"), [("quarot", "rotation_seed"), ("flatquant", "start_seed")])
def test_seeds_of_a_method_are_a_row(tmp_path: Path, method: str, seed: str) -> None:
    for number in (0, 1, 2):
        put(tmp_path, [1.0, 0.0], f"method={method}", "bits=w4a4", f"method.{seed}={number}")
    (row,) = rows_of(read_runs(tmp_path), None, [])
    assert row.n_seeds == (1, 3) and len(row.row.runs) == 3


def test_what_tells_runs_of_a_method_apart_names_their_rows(tmp_path: Path) -> None:
    for size in (16, 8, 32):
        put(tmp_path, [1.0, 0.0], "method=star_quant", "bits=w4a4", f"method.tac.block_size={size}")
    assert labels(tmp_path) == [(f"w4a4 star_quant (tac.block_size={size})", 1) for size in (8, 16, 32)]


def test_an_experiment_names_its_rows_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    rows = [("full", "none"), ("Rounding", "rtn"), ("QuaRot", "quarot")]
    own = tuple(RowOf(label, {"method.name": name}) for label, name in rows)
    mine = Definition("mine", "Mine", own, against="Rounding")
    assert labels(tmp_path, mine) == [("full", 2), ("w4a4 Rounding", 2)]
    monkeypatch.setitem(contents.EXPERIMENTS, "mine", mine)
    page = content(tmp_path, experiment="mine")
    assert page.title == "Mine"
    assert page.notes["Missing"] == ["QuaRot: no record"]
    assert page.table["rows"][page.table["reference"]]["label"] == "Rounding"


def test_figures_and_differences_are_those_of_the_table_over_seeds(tmp_path: Path) -> None:
    fill(tmp_path)
    page, rows = content(tmp_path), across_seeds.read_rows(tmp_path)
    frame = across_seeds.table(rows).set_index("method")
    against = across_seeds.table(rows, "rtn").set_index("method")
    assert page.table["columns"] == [{"name": "facts acc", "unit": "%", "better": True, "task": "testbed_facts"}]
    for name in ("gptq", "rtn"):
        (cell,) = cells(page.table, name)
        assert f"{cell['mean']:.1f} ({cell['stderr']:.1f})" == frame.loc[name, "facts acc"]
        assert cell["n"] == 4
    (mean, low, high) = page.table["differences"]["1-2"][0]  # gptq minus rtn
    assert f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" == against.loc["gptq", "facts acc"]
    assert mean == cells(page.table, "gptq")[0]["mean"] - cells(page.table, "rtn")[0]["mean"] == 12.5


def test_rows_of_other_items_have_no_difference_and_the_page_says_why(tmp_path: Path) -> None:
    put(tmp_path, [1.0, 0.0, 1.0], "method=rtn", "bits=w4a4")
    put(tmp_path, [1.0, 0.0], "method=gptq", "bits=w4a4", "tasks.limit=2")
    page = content(tmp_path)
    assert page.table["differences"] == {}
    known = page.notes["To be known"]
    assert "some rows are of the first 2 items of each task only" in known
    assert any(line.startswith("no paired difference: w4a4 gptq: items of testbed_facts differ") for line in known)


def test_a_second_record_of_a_row_is_refused_by_name_and_the_page_is_built(tmp_path: Path) -> None:
    put(tmp_path / "a", [1.0, 0.0, 1.0], "method=rtn", "bits=w4a4")
    again = put(tmp_path / "b", [0.0, 0.0, 1.0], "method=rtn", "bits=w4a4")
    page = content(tmp_path)
    assert [row["cells"][0]["mean"] for row in page.table["rows"]] == [66.6667]
    (refused,) = page.notes["Refused"]
    assert refused.startswith(f"{again.name}: ") and "they are of one experiment and differ" in refused


def test_a_record_without_items_shows_its_scores(tmp_path: Path) -> None:
    path = put(tmp_path, [1.0, 0.0, 1.0, 1.0], "method=rtn", "bits=w4a4")
    for file in path.with_suffix(".items").iterdir():
        file.unlink()
    from starquant.reports.run import Run
    from starquant.store.records import read_record

    refused: list[str] = []
    (row,) = rows_of([Run(path, read_record(path))], None, refused)
    assert row.row.runs == {}
    from starquant.reports.page.table import columns_of, comparison

    (line,) = comparison([row], columns_of([row]))["rows"]
    assert line["cells"] == [{"mean": 75.0, "stderr": None, "low": None, "high": None, "n": 4}]
    assert len(refused) == 1 and "its scores stand without paired differences" in refused[0]
