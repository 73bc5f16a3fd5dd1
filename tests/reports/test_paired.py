"""Paired comparison of two records' items, and the report's fidelity rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starquant.errors import RecordError
from starquant.reports.paired import main, record_named, shared
from starquant.reports.run_table import rows
from starquant.statistics.bootstrap import PairedInterval, paired_bootstrap
from starquant.store.record import Score
from starquant.store.records import read_record
from tests.support.records import edit_record, fidelity_rows, items_of, write


def compare(a: Path, b: Path, task: str, metric: str, filter_name: str = "none") -> PairedInterval:
    """The row of one metric."""
    (interval,) = (row[3] for row in shared(a, b) if row[:3] == (task, metric, filter_name))
    return interval


def test_difference_is_of_pairs(tmp_path: Path) -> None:
    a, b = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    first = write(tmp_path, "w8a8", {"testbed_facts": items_of(a)[::-1]})  # order does not matter
    second = write(tmp_path, "w4a4", {"testbed_facts": items_of(b)})
    found = compare(first, second, "testbed_facts", "acc")
    assert found == paired_bootstrap(a, b)
    assert (found.mean, found.n) == (0.5, 4)
    assert compare(second, first, "testbed_facts", "acc").mean == -0.5


def test_a_prompts_rows_are_averaged(tmp_path: Path) -> None:
    a, b = [[1.0, 3.0], [5.0], [2.0]], [[1.0, 1.0], [1.0], [2.0]]
    first = write(tmp_path, "w4a4", {"fidelity": fidelity_rows(a)})
    second = write(tmp_path, "w8a8", {"fidelity": fidelity_rows(b)})
    assert compare(first, second, "fidelity", "kl") == paired_bootstrap([2.0, 5.0, 2.0], [1.0, 1.0, 2.0])
    assert compare(first, second, "fidelity", "same_answer").across_zero == 1.0
    assert {(task, metric) for task, metric, _, _ in shared(first, second)} == {
        ("fidelity", "kl"),
        ("fidelity", "same_answer"),
    }


def test_filters_are_kept_apart(tmp_path: Path) -> None:
    both = items_of([1.0, 1.0], filter="strict") + items_of([0.0, 1.0], filter="flexible")
    first = write(tmp_path, "w8a8", {"gsm8k": both})
    second = write(tmp_path, "w4a4", {"gsm8k": [row | {"acc": 0.0} for row in both]})
    assert compare(first, second, "gsm8k", "acc", "strict").mean == 1.0
    assert compare(first, second, "gsm8k", "acc", "flexible").mean == 0.5
    assert {name for _, _, name, _ in shared(first, second)} == {"strict", "flexible"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (items_of([1.0, 0.0]), "their items of acc differ"),
        (items_of([1.0, 0.0, 0.0], doc_hash="other"), "their items of acc differ"),
        ([{"doc_id": i, "exact": 1.0} for i in range(3)], "hold no common metric of testbed_facts"),
        (items_of([1.0, 0.0, float("nan")]), "line 3: acc is nan"),
        ([{"value": 1.0}], "line 1: has neither doc_id nor prompt"),
        ([], "line 1: not valid JSON"),
    ],
)
def test_unequal_and_damaged_items_are_refused(tmp_path: Path, other: list[dict[str, Any]], message: str) -> None:
    first = write(tmp_path, "w8a8", {"testbed_facts": items_of([1.0, 0.0, 1.0])})
    second = write(tmp_path, "w4a4", {"testbed_facts": other})
    (second.with_suffix(".items") / "columns.json").unlink()  # as in records of before
    with pytest.raises(RecordError, match=message):
        compare(first, second, "testbed_facts", "acc")


def test_items_of_a_hub_with_other_examples_are_refused(tmp_path: Path) -> None:
    items = {"testbed_facts": items_of([1.0, 0.0, 1.0])}
    first, second, third = (write(tmp_path, bits, items) for bits in ("w8a8", "w4a4", "w4a16"))
    for path, digest in ((first, "a"), (second, "b")):
        edit_record(path, lambda data, digest=digest: data["provenance"].update(documents={"testbed_facts": digest}))
    with pytest.raises(RecordError, match="their items of testbed_facts differ, or the examples in front of them"):
        shared(first, second)
    assert shared(first, third)  # which does not tell


def test_one_item_and_missing_files_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "w8a8", {"testbed_facts": items_of([1.0])})
    second = write(tmp_path, "w4a4", {"testbed_facts": items_of([1.0])})
    with pytest.raises(RecordError, match="needs two or more"):
        compare(first, second, "testbed_facts", "acc")
    third = write(tmp_path, "w4a16", {"other": items_of([1.0])})
    with pytest.raises(RecordError, match="hold items of no common task"):
        shared(first, third)


def test_command_line(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 40).astype(float).tolist()
    first = write(tmp_path, "w8a8", {"testbed_facts": items_of(values)})
    second = write(tmp_path, "w4a4", {"testbed_facts": items_of([0.0] * 40), "only_here": items_of([1.0, 1.0])})
    assert main([str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "n", "difference", "low", "high", "across", "zero"]
    assert lines[1].split()[:4] == ["testbed_facts", "acc", "40", f"{np.mean(values):+.4g}"]
    assert len(lines) == 2
    first.write_text("{")
    assert main([str(first), str(second)]) == 2
    assert str(first) in capsys.readouterr().err


def fidelity_score(metric: str, value: float, unit: str, filter_name: str = "all") -> Score:
    common = {"stderr": value / 10, "n": 5, "higher_is_better": False, "task_version": "1", "num_fewshot": None}
    return Score(task="fidelity", metric=metric, filter=filter_name, value=value, unit=unit, **common)


def test_report_shows_fidelity_by_unit_without_full_precision(tmp_path: Path) -> None:
    scores = [
        fidelity_score("kl", 0.0123456, "nats"),
        fidelity_score("kl", 0.5, "nats", "mask_ratio_0.00_0.25"),
        fidelity_score("commit_flips", 0.25, "fraction"),
        fidelity_score("hidden_mse", 1.23456e-6, "relative"),
    ]
    record = read_record(write(tmp_path, "w4a4", {}, scores))
    baseline = read_record(write(tmp_path, "w8a8", {}, scores))
    assert rows(record, baseline) == [
        ("testbed_facts", "acc", "8", "50.00", "50.00", "+0.00", "1.00"),
        ("fidelity", "kl (nats)", "5", "", "0.01235", "", "0.001235"),
        ("fidelity", "commit_flips", "5", "", "25.00", "", "2.50"),
        ("fidelity", "hidden_mse (relative)", "5", "", "1.235e-06", "", "1.235e-07"),
    ]


def test_records_of_schema_version_1_are_still_read(tmp_path: Path) -> None:
    path = write(tmp_path, "w4a4", {})
    old = json.loads(path.read_text())
    assert (old["schema_version"], old["calibration"], old["fit_report"]) == (4, None, [])
    del old["calibration"], old["fit_report"], old["seal"]
    for score in old["scores"]:
        del score["ci_low"], score["ci_high"], score["unit"]
    path.write_text(json.dumps(old | {"schema_version": 1}))
    found = read_record(path)
    assert (found.schema_version, found.scores[0].unit, found.scores[0].ci_low) == (1, "fraction", None)
    path.write_text(json.dumps(old | {"schema_version": 5}))
    with pytest.raises(RecordError, match="schema_version is 5, this version reads 1 and 2 and 3 and 4"):
        read_record(path)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("", "error: compare: got '', allowed: a path"),
        ("~nosuchuser/x", "error: compare: got '~nosuchuser/x', but that home is not known"),
    ],
)
def test_a_word_that_is_no_path_is_one_line(word: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "b"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_a_record_is_named_by_a_part_of_its_name_that_no_other_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path, "w8a8", {"testbed_facts": items_of([1.0, 0.0])})
    second = write(tmp_path, "w4a4", {"testbed_facts": items_of([0.0, 0.0])})
    assert record_named("w8a8", tmp_path) == record_named(str(first), tmp_path / "elsewhere") == first
    assert record_named(second.stem.rpartition("-")[2], tmp_path) == second
    with pytest.raises(RecordError, match=r"^tiny: 2 records in .* have that in their names: tiny-w4a4-"):
        record_named("tiny", tmp_path)
    with pytest.raises(RecordError, match=r"^w3a3: no record in .*; allowed: a file, a part of tiny-w4a4-"):
        record_named("w3a3", tmp_path)
    assert main(["w8a8", "w4a4", "--records", str(tmp_path)]) == 0
    assert "+0.5" in capsys.readouterr().out


def test_a_name_that_is_looked_up_where_no_record_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    lines = {
        "file": "--records: {}: no such folder, and 'w8a8' is no file; allowed: a results folder",
        "nowhere": "--records: {}: no such folder, and 'w8a8' is no file; allowed: a results folder",
        "empty": "{}: holds no record, and 'w8a8' is no file",
    }
    for name, line in lines.items():
        assert main(["w8a8", "w4a4", "--records", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err == f"error: {line.format(tmp_path / name)}\n"
