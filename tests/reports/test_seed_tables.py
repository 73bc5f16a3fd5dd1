"""Tables over rotation seeds of a definition's rows, and the figure beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from starquant.errors import RecordError
from starquant.reports.definitions import SMOL_MAIN
from starquant.reports.experiments import build
from starquant.reports.seed_tables import frames, seed_rows
from starquant.reports.selection import Results
from starquant.store.record import Score
from tests.support.records import fidelity_rows, write_record

GROUPS = ("fidelity_text", "fidelity_tasks")


def write(folder: Path, method: str, values: list[float], *overrides: str) -> Path:
    """A record of smol with these KLs, of text and doubled of tasks."""
    items = {
        group: [row | {"top1_agreement": 0.5} for row in fidelity_rows([[factor * v, factor * v] for v in values])]
        for factor, group in ((1, GROUPS[0]), (2, GROUPS[1]))
    }
    scores = [
        Score(
            task=group,
            metric="kl",
            filter="all",
            value=1.0,  # `write_record` puts the items' own
            stderr=None,
            n=len(values),
            higher_is_better=False,
            task_version="1",
            num_fewshot=None,
            unit="nats",
        )
        for group in GROUPS
    ]
    return write_record(folder, items, "model=smol", "tasks=fidelity", f"method={method}", *overrides, scores=scores)


def test_rows_are_those_of_the_definition_and_differences_are_paired(tmp_path: Path) -> None:
    write(tmp_path, "rtn", [4.0, 6.0])
    for seed in (0, 1):
        write(tmp_path, "quarot", [1.0 + seed, 3.0 + seed], f"method.rotation_seed={seed}")
    write(tmp_path, "star_quant", [1.0, 2.0], "method.transform.steps=80")
    write(tmp_path, "star_quant", [9.0, 9.0], "method.transform.steps=40")  # of no row
    write(tmp_path, "quarot", [0.5, 0.5], "bits=w8a8")
    rows = seed_rows(SMOL_MAIN, Results(tmp_path).runs, ["dirty"])
    assert [(*row.label, len(row.runs)) for row in rows] == [
        ("w4a4", "RTN", 1),
        ("w4a4", "QuaRot", 2),
        ("w4a4", "STaR-Quant", 1),
        ("w8a8", "QuaRot", 1),
    ]
    tables = frames(SMOL_MAIN, rows)
    assert list(tables) == ["values", "against QuaRot", "against STaR-Quant"], "QuaRot with clip was not run"
    values, against, to_star = tables.values()
    assert [cell.split()[0] if cell else "" for cell in to_star["kl (text)"]] == ["+3.5", "+0.5", ""]
    assert [cell.split()[0] for cell in values["kl (text)"]] == ["5", "2.5", "1.5", "0.5"]
    assert [cell.split()[0] for cell in values["kl (tasks)"]] == ["10", "5", "3", "1"]
    assert [cell.split()[0] if cell else "" for cell in against["kl (text)"]] == ["+2.5", "", "-0.5", ""]


def test_table_and_figure_are_written(tmp_path: Path) -> None:
    write(tmp_path, "rtn", [4.0, 6.0])
    paths = build("smol_main", tmp_path, tmp_path / "out", allow=["dirty"])
    assert [path.name for path in paths] == [f"smol_main{suffix}" for suffix in (".md", ".csv", ".png", ".pdf")]
    assert "## against" not in paths[0].read_text(), "nothing to compare with"
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_rows_of_few_seeds_are_named_below_the_table(tmp_path: Path) -> None:
    """Of methods that draw something: rounding needs no second seed. FlatQuant's start counts as one."""
    write(tmp_path, "rtn", [4.0, 6.0])
    write(tmp_path, "flatquant", [1.0, 2.0], "method.start_seed=4")
    for seed in (0, 1, 2):
        write(tmp_path, "quarot", [1.0, 3.0], f"method.rotation_seed={seed}")
    write(tmp_path, "dllmquant_plus_plus", [1.0, 3.0], "method.rotation_seed=0")
    text = build("smol_main", tmp_path, tmp_path / "out", allow=["dirty"])[0].read_text()
    assert text.endswith("noise between seeds: w4a4 DLLMQuant++ (1), w4a4 FlatQuant (1).\n")
    flat = next(line for line in text.partition("## against QuaRot")[2].splitlines() if "FlatQuant" in line)
    assert flat.endswith("| 0 | 2 |  |  |  |  |"), "no run of a seed that both have"
    write(tmp_path, "flatquant", [1.0, 2.0], "method.start_seed=0")
    text = build("smol_main", tmp_path, tmp_path / "out", allow=["dirty"])[0].read_text()
    assert "w4a4 FlatQuant (2)." in text
    flat = next(line for line in text.partition("## against QuaRot")[2].splitlines() if "FlatQuant" in line)
    assert "| 1 | 2 | -0.5 [" in flat


def test_two_records_of_one_cell_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "rtn", [4.0, 6.0])
    write(tmp_path, "rtn", [4.0, 5.0], "fidelity.positions=3")
    with pytest.raises(RecordError, match="a second record of w4a4 RTN"):
        build("smol_main", tmp_path, tmp_path / "out", allow=["dirty"])
    with pytest.raises(RecordError, match="holds no record of smol_main"):
        seed_rows(SMOL_MAIN, [], ["dirty"])
