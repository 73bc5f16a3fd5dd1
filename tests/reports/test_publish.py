"""Published records give the same figures from fewer bytes, and nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from starquant.reports.across_seeds import read_rows, table
from starquant.reports.page.content import content_of
from starquant.reports.paired import shared
from starquant.reports.publish import main
from starquant.reports.selection import Results
from starquant.store.compact import RECORDS
from starquant.store.items import items_folder, read_raw
from starquant.store.source import items_files, read_file
from tests.support.paths import REPOSITORY
from tests.support.records import fidelity_rows, items_of, write


@pytest.fixture
def records(tmp_path: Path) -> tuple[Path, Path]:
    a = {"testbed_facts": items_of([1.0, 0, 1, 1]), "fidelity": fidelity_rows([[1.0, 3.0], [5.0]])}
    b = {"testbed_facts": items_of([0.0, 0, 1, 0]), "fidelity": fidelity_rows([[0.5, 1.0], [2.0]])}
    return write(tmp_path / "own", "w8a8", a), write(tmp_path / "own", "w4a4", b)


def test_paired_differences_are_the_same(records: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "published"
    assert main([str(tmp_path / "own"), str(out), "--items", "numbers"]) == 0
    copies = [out / RECORDS / path.name for path in records]
    own, published = ({row[:2]: row for row in shared(*pair)} for pair in (records, copies))
    for metric in (("testbed_facts", "acc"), ("fidelity", "kl")):
        assert published[metric] == own[metric]
    copied, original = (json.loads(read_file(path)) for path in (copies[0], records[0]))
    assert [*copied["seal"].pop("items")] == ["columns.json"] and copied["seal"].pop("content")
    assert copied == original | {"seal": {}}
    assert items_files(items_folder(copies[0])) == ["columns.json"]


def test_steps_are_kept_where_asked(records: tuple[Path, Path], tmp_path: Path) -> None:
    assert main([str(tmp_path / "own"), str(tmp_path / "out"), "--items", "steps"]) == 0
    rows = read_raw(tmp_path / "out" / RECORDS / records[0].name, "fidelity")
    assert [(row["prompt"], row["step"], row["kl"]) for row in rows] == [(0, 0, 1.0), (0, 1, 3.0), (1, 0, 5.0)]


def test_nothing_is_overwritten(records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "published"
    out.mkdir()
    (out / records[1].name).write_text("mine")
    assert main([str(tmp_path / "own"), str(out)]) == 2
    assert "holds records already" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [records[1].name]
    assert main([str(tmp_path / "nothing"), str(out)]) == 2


def test_of_copies_one_is_published_and_two_scores_of_one_experiment_are_refused(
    records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = records[0].parent / "copies"
    shutil.copytree(records[0].parent, tmp_path / "copies")
    shutil.move(tmp_path / "copies", copy)
    assert main([str(tmp_path / "own"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(f"2 records in {tmp_path / 'out'} (2 files, ")
    shutil.rmtree(copy)
    other = write(copy, "w8a8", {"testbed_facts": items_of([0.0, 0, 1, 1]), "fidelity": fidelity_rows([[1.0]])})
    assert main([str(tmp_path / "own"), str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert f"{records[0]}" in said and f"{other}" in said
    assert said.endswith("two records of one experiment, with other scores; keep one of them\n")
    assert not (tmp_path / "again").exists()


def test_tables_and_page_are_the_same_from_both_forms(tmp_path: Path) -> None:
    compact, plain = REPOSITORY / "results" / "published" / "testbed_w3a3", tmp_path / "testbed_w3a3"
    assert main([str(compact), str(plain), "--plain"]) == 0
    tables = [table(read_rows(folder)) for folder in (compact, plain)]
    assert len(tables[0]) == 4 and tables[0].equals(tables[1])
    assert content_of(Results(compact)) == content_of(Results(plain))
