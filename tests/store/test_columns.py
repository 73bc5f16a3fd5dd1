"""The numbers kept beside items are those of the items, and damaged ones are named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starquant.errors import RecordError
from starquant.store.columns import FILE, columns_of, write_columns
from starquant.store.items import read_columns, read_rows
from starquant.store.records import RecordStore
from tests.support.records import fidelity_rows, items_of, make_record
from tests.support.specs import spec

VALUES = [1.0, 0.0, 1.0, 0.123456789]


def items_folder(folder: Path, items: dict[str, list[dict[str, Any]]]) -> Path:
    run = spec()
    return RecordStore(folder).write(run, make_record(run), items).with_suffix(".items")


def test_numbers_are_those_of_the_rows(tmp_path: Path) -> None:
    strict, flexible = items_of(VALUES, filter="strict"), items_of(VALUES[::-1], filter="flexible")
    folder = items_folder(tmp_path, {"gsm8k": strict + flexible, "testbed_facts": items_of(VALUES[:2])})
    found = read_columns(folder)
    assert set(found) == {"gsm8k", "testbed_facts"}
    for task, columns in found.items():
        slow: dict[str, dict[int, float]] = {}
        for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            slow.setdefault(f"acc,{row['filter']}", {})[row["doc_id"]] = row["acc"]
        expected = {name: [by_item[i] for i in sorted(by_item)] for name, by_item in slow.items()}
        assert columns.values == expected
        assert columns.n == len(next(iter(expected.values())))
    assert list(found["gsm8k"].values) == ["acc,strict", "acc,flexible"]


def test_the_file_is_as_good_as_the_rows(tmp_path: Path) -> None:
    items = {"b": items_of(VALUES), "a": items_of(VALUES[::-1]), "fidelity": fidelity_rows([[0.1, 0.4], [0.3]])}
    folder = items_folder(tmp_path, items)
    kept = read_columns(folder)
    assert list(kept) == ["b", "a", "fidelity"]
    (folder / FILE).unlink()
    assert read_columns(folder) == kept
    for path in folder.glob("*.jsonl"):
        path.unlink()
    with pytest.raises(RecordError, match="items of the record cannot be read"):
        read_columns(folder)
    write_columns(folder, items)
    assert read_columns(folder) == kept


def test_fidelity_is_a_mean_over_the_steps_of_a_prompt() -> None:
    found = columns_of(fidelity_rows([[1.0, 3.0], [5.0], [1.0, 1.0, 4.0]]))
    assert found.values == {"kl,none": [2, 5, 2], "same_answer,none": [1, 1, 1]}
    assert found.n == 3


def test_the_order_of_rows_does_not_matter() -> None:
    rows = items_of([float(i) for i in range(12)])
    assert columns_of(rows) == columns_of(rows[::-1]) == columns_of(rows[5:] + rows[:5])
    assert columns_of(rows).values["acc,none"] == list(range(12))


def test_the_digest_says_which_items_they_are() -> None:
    rows = items_of([1.0, 0.0, 1.0])
    digest = columns_of(rows).items
    assert columns_of(items_of([0.0, 0.0, 0.0])).items == digest
    others = [
        [rows[0] | {"doc_hash": "another"}, *rows[1:]],  # another document under the same number
        [rows[0] | {"doc_id": 7}, *rows[1:]],
        rows[:2],
        items_of([1.0, 0.0, 1.0, 1.0]),
    ]
    assert len({digest, *(columns_of(other).items for other in others)}) == 5


def test_metrics_that_some_items_lack_are_left_out() -> None:
    rows = items_of([1.0, 0.0, 1.0])
    del rows[1]["acc"]
    for row in rows:
        row["metrics"] = ["acc", "acc_norm"]
        row["acc_norm"] = 0.5
    assert columns_of(rows).values == {"acc_norm,none": [0.5, 0.5, 0.5]}


def test_only_metrics_are_kept() -> None:
    """Not what identifies an item, what holds no number, nor what lm-eval does not name as a metric."""
    rows = items_of([1.0, 0.0], length=7, note="x", mask_ratio=0.5)
    assert columns_of(rows).values == {"acc,none": [1, 0]}
    unnamed = [{key: value for key, value in row.items() if key != "metrics"} for row in rows]
    assert columns_of(unnamed).values == {"length,none": [7, 7], "acc,none": [1, 0]}
    assert columns_of([]).n == columns_of([{"acc": 1.0}]).n == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_not_kept(tmp_path: Path, bad: float) -> None:
    with pytest.raises(ValueError, match=f"line 2: acc is {bad}, not a finite number"):
        columns_of(items_of([1.0, bad, 1.0]))
    folder = items_folder(tmp_path, {"good": items_of([1.0, 0.0]), "bad": items_of([1.0, bad])})
    assert set(read_columns(folder)) == {"good"}
    assert "Infinity" not in (folder / FILE).read_text()
    (folder / FILE).unlink()
    with pytest.raises(RecordError, match=rf"bad\.jsonl: line 2: acc is {bad}"):
        read_columns(folder)


def changed(*keys: Any, **to: Any) -> Callable[[Any], Any]:
    """Delete what the keys lead to, or replace it by `value`."""

    def change(content: Any) -> Any:
        here = content
        for key in keys[:-1]:
            here = here[key]
        if to:
            here[keys[-1]] = to["value"]
        else:
            del here[keys[-1]]
        return content

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda content: [content],
        lambda content: None,
        changed("schema_version", value=2),
        changed("schema_version"),
        changed("tasks"),
        changed("tasks", value=[]),
        changed("tasks", "a", value=3),
        changed("tasks", "a", "items"),
        changed("tasks", "a", "n", value=5),
        changed("tasks", "a", "values", "acc,none", 0),
        changed("tasks", "a", "values", "acc,none", 0, value="x"),
        changed("tasks", "a", "values", "acc,none", 0, value=math.nan),
    ],
)
def test_damaged_and_newer_files_are_named(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    folder = items_folder(tmp_path, {"a": items_of(VALUES)})
    path = folder / FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(RecordError, match=f"{path}: not readable .*; delete it"):
        read_columns(folder)


def test_files_that_are_no_json_are_named(tmp_path: Path) -> None:
    folder = items_folder(tmp_path, {"a": items_of(VALUES)})
    path = folder / FILE
    for content in (path.read_bytes()[:-20], b"", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(RecordError, match=f"{path}: not readable"):
            read_columns(folder)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = items_of(VALUES)
    folder = items_folder(tmp_path, {"a": rows})
    assert read_rows(folder / "a.jsonl") == rows
    for text, message in (('{"doc_id": 0}\n{', "line 2: not valid JSON"), ("[]\n", "line 1: has neither doc_id nor")):
        (folder / "a.jsonl").write_text(text)
        with pytest.raises(RecordError, match=rf"a\.jsonl, {message}"):
            read_rows(folder / "a.jsonl")
    with pytest.raises(RecordError, match=r"b\.jsonl: items cannot be read"):
        read_rows(folder / "b.jsonl")
