"""Records: atomic, found by digest, never read when damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from starquant.errors import RecordError
from starquant.store.files import write_atomically
from starquant.store.provenance import CodeDigest, collect, running_code
from starquant.store.records import RecordStore, read_record
from starquant.store.source import record_paths
from tests.support.records import make_record, of_items
from tests.support.specs import spec


def test_round_trip_and_layout(tmp_path: Path) -> None:
    run, store = spec(), RecordStore(tmp_path)
    assert store.find(run) is None
    items = {"testbed_facts": [{"doc_id": 0, "acc": 1.0}]}
    written = of_items(make_record(run), items)
    path = store.write(run, written, items)
    stored = store.find(run)
    assert stored == written.model_copy(update={"seal": stored.seal})
    assert {*stored.seal.items} == {"testbed_facts.jsonl", "columns.json"}
    assert path == tmp_path / "records" / f"tiny-w4a4-rtn-testbed-{run.digest()}.json"
    assert json.loads((path.with_suffix(".items") / "testbed_facts.jsonl").read_text()) == {"doc_id": 0, "acc": 1.0}
    keys = {"schema_version", "digest", "spec", "status", "scores", "manifest", "calibration", "fit_report"}
    keys |= {"timings", "provenance", "seal"}
    assert set(json.loads(path.read_text())) == keys


def test_another_run_is_not_found(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.write(spec(), make_record(spec()))
    assert store.find(spec("seed=1")) is None
    assert store.find(spec("runtime.batch_size=1")) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"status": "complete"', '"status": "perhaps"'),
        lambda text: text.replace('"digest": "', '"digest": "0'),
    ],
)
def test_damaged_records_are_named_and_set_aside(tmp_path: Path, damage, capsys) -> None:
    run, store = spec(), RecordStore(tmp_path)
    for suffix in ("", ".1"):  # what was set aside before stays
        path = store.write(run, make_record(run))
        path.write_text(damaged := damage(path.read_text()))
        assert store.find(run) is None
        assert f"warning: {path}: " in capsys.readouterr().err
        assert path.with_name(f"{path.name}.damaged{suffix}").read_text() == damaged
    assert list(record_paths(tmp_path)) == []


def test_records_of_a_later_version_are_left_alone(tmp_path: Path) -> None:
    run, store = spec(), RecordStore(tmp_path)
    path = store.write(run, make_record(run))
    path.write_text(path.read_text().replace('"schema_version": 4', '"schema_version": 99'))
    with pytest.raises(RecordError, match=f"{path}: schema_version is 99, this version reads 1 and 2 and 3 and 4"):
        store.find(run)
    assert path.exists()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_full_disk_is_a_named_error(tmp_path: Path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match="No space left"):
        RecordStore(tmp_path).write(spec(), make_record(spec()))
    assert list((tmp_path / "records").iterdir()) == []


def test_nan_scores_are_refused_rather_than_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RecordStore(tmp_path).write(spec(), make_record(spec(), float("nan")))
    assert not list((tmp_path / "records").glob("*.json"))


def test_provenance_says_where_a_number_came_from(tmp_path: Path) -> None:
    code = running_code()
    found = collect("cpu", "cpu", code)
    assert found["code_digest"] == code.scoring == CodeDigest().of()
    assert found["packages"]["torch"]
    assert isinstance(found["git_dirty"], bool | None)


def test_read_record_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"nothing\.json"):
        read_record(tmp_path / "nothing.json")
