"""Tables take no record that is not what was written: it is named, left out, and the command fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from starquant.errors import RecordError
from starquant.reports import comparison, paired, publish
from starquant.reports.__main__ import main
from starquant.reports.after_sweep import after_sweep
from starquant.reports.figures import steps_of
from starquant.reports.frame import scores_frame
from starquant.reports.selection import Results, read_runs
from tests.support.tables import FACTS, answers, put


def edited(path: Path) -> None:
    data = json.loads(path.read_text())
    data["scores"][0]["value"] = 0.99
    path.write_text(json.dumps(data))


def without_items(path: Path) -> None:
    shutil.rmtree(path.with_suffix(".items"))


def negative(path: Path) -> None:
    path.write_text(path.read_text().replace('"stderr": null', '"stderr": -0.5', 1))


def not_a_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"stderr": null', '"stderr": NaN', 1))


def cut(path: Path) -> None:
    path.write_text("{")


DAMAGES = {
    edited: "not what was written",
    without_items: "the items of the record are missing",
    negative: "scores.0.stderr: got -0.5",
    not_a_number: "scores.0.stderr: got nan",
    cut: "not readable as a record",
}


@pytest.fixture
def records(tmp_path: Path) -> tuple[Path, Path]:
    """Two records of table 2."""
    one = put(tmp_path, {FACTS: answers(0)}, "rtn", kl=[0.1, 0.2])
    return one, put(tmp_path, {FACTS: answers(1)}, "star_quant", kl=[0.1, 0.3])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_record_that_fails_is_named_and_left_out(
    records: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(records[0])
    assert main(["table1_main", "--records", str(tmp_path)]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {records[0].with_suffix('')}") and line.endswith("; the record is left out")
    assert DAMAGES[damage] in line
    table = (tmp_path / "tables" / "table1_main.md").read_text()
    assert "| STaR-Quant | 1 |" in table and "| RTN | 1 |" not in table
    assert records[0].exists(), "reports move nothing"


def test_nothing_is_built_of_nothing(
    records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in records:
        edited(path)
    assert main(["table1_main", "--records", str(tmp_path)]) == 2
    assert [line.split(": ")[-1] for line in capsys.readouterr().err.splitlines()][
        -1
    ] == "holds no record of table1_main"
    assert not (tmp_path / "tables").exists()


def test_a_sweep_whose_table_leaves_a_record_out_has_not_built_it(records: tuple[Path, Path], tmp_path: Path) -> None:
    assert after_sweep("table1_main", tmp_path)
    edited(records[0])
    assert not after_sweep("table1_main", tmp_path)


def test_every_other_reader_refuses(
    records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(records[0])
    for read in (scores_frame, read_runs, lambda folder: steps_of([records[0]], "kl")):
        with pytest.raises(RecordError, match=f"^{records[0]}: not what was written"):
            read(tmp_path)
    out = tmp_path / "out"
    assert comparison.main([str(tmp_path)]) == paired.main(list(map(str, records))) == 2
    assert publish.main([str(tmp_path / "records"), str(out)]) == 2 and not out.exists()
    assert capsys.readouterr().err.count(f"error: {records[0]}: not what was written") == 3


def test_damaged_compact_records_are_said_once(
    records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "published"
    assert publish.main([str(tmp_path / "records"), str(out)]) == 0
    capsys.readouterr()
    (out / "items.parquet").write_bytes(b"PAR1")
    assert not Results(out).runs
    (line,) = capsys.readouterr().err.splitlines()
    assert "items.parquet: not readable" in line and line.endswith("; 2 records are left out")
    (out / "records.parquet").write_bytes(b"PAR1")
    assert paired.main(["rtn", "star", "--records", str(out)]) == 2
    assert "records.parquet: not readable as compact records" in capsys.readouterr().err


def test_edited_steps_of_a_figure_are_refused(records: tuple[Path, Path]) -> None:
    rows = records[0].with_suffix(".items") / "fidelity.jsonl"
    rows.write_text(rows.read_text().replace("0.11", "0.99"))
    with pytest.raises(RecordError, match=r"fidelity\.jsonl: is not what was written"):
        steps_of([records[0]], "kl")


def test_what_is_published_is_sealed_too(records: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "published"
    assert publish.main([str(tmp_path / "records"), str(out), "--items", "numbers", "--plain"]) == 0
    assert not Results(out).faults and Results(out).unsealed == 0 and len(read_runs(out)) == 2
    columns = out / records[0].with_suffix(".items").name / "columns.json"
    columns.write_text(columns.read_text().replace("1.0", "0.0", 1))
    with pytest.raises(RecordError, match=r"columns\.json: is not what was written$"):
        read_runs(out)


def test_records_without_a_seal_are_taken_and_said_to_be(
    records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(records[0].read_text())
    del data["seal"]
    records[0].write_text(json.dumps(data | {"schema_version": 3}))
    assert main(["table1_main", "--records", str(tmp_path)]) == 0
    assert capsys.readouterr().err.startswith(f"note: 1 of 2 records in {tmp_path} were written without a seal")
    assert "| RTN | 1 |" in (tmp_path / "tables" / "table1_main.md").read_text()
