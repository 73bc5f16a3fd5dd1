"""The compact form gives every file back byte for byte, and is believed no more than its seals hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from starquant.errors import RecordError
from starquant.reports.publish import publish
from starquant.store.compact import ITEMS, RECORDS, Compact
from starquant.store.compacting import RecordFiles, write_compact
from starquant.store.items import items_folder
from starquant.store.records import read_record
from starquant.store.source import items_files, read_file, record_paths
from starquant.store.verification import validate_items
from tests.support.records import fidelity_rows, items_of, write

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.lists(st.one_of(st.none(), st.integers(), st.text("a\u2028\n")), max_size=3),
)
LINES = st.lists(st.dictionaries(st.sampled_from(["prompt", "kl", "group", "line", "x"]), VALUES), max_size=5)


@example(tasks=[[{"prompt": 2**63}]], torn=False)
@settings(max_examples=40, deadline=None)
@given(tasks=st.lists(LINES, min_size=1, max_size=4), torn=st.booleans())
def test_any_items_come_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, tasks: list[list[dict[str, Any]]], torn: bool
) -> None:
    folder = tmp_path_factory.mktemp("compact")
    texts = ["".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for rows in tasks]
    texts[0] = texts[0][:-2] if torn else texts[0]
    files = {f"task{number}.jsonl": text for number, text in enumerate(texts)}
    records = [RecordFiles(name, '{"a": 1}', files) for name in ("one", "two")]
    write_compact(folder, records)
    compact = Compact(folder / RECORDS)
    for one in records:
        assert {name: compact.items_file(one.name, name) for name in compact.items_files(one.name)} == files
        assert compact.record(one.name) == one.record


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Two records of a task and of fidelity, of all texts and of one group of them."""
    for bits, values in (("w4a4", [1.0, 0.0, 1.0]), ("w8a8", [0.0, 1.0, 1.0])):
        rows = [row | {"group": "tasks"} for row in fidelity_rows([[0.123456789, 0.25], [values[0]]])]
        rows += [row | {"group": "text"} for row in fidelity_rows([[0.5], [values[1]], [1e-7]])]
        own = {"fidelity": rows, "fidelity_text": [row for row in rows if row["group"] == "text"]}
        write(tmp_path / "plain", bits, {"testbed_facts": items_of(values)} | own)
    return tmp_path / "plain"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_records_go_to_the_compact_form_and_back(plain: Path, tmp_path: Path) -> None:
    assert publish(plain, tmp_path / "compact") == 2
    assert {*files_of(tmp_path / "compact")} == {RECORDS, ITEMS}
    assert publish(tmp_path / "compact", tmp_path / "back", plain=True) == 2
    assert files_of(tmp_path / "back") == files_of(plain / "records")


def test_what_repeats_or_follows_is_kept_once(plain: Path, tmp_path: Path) -> None:
    publish(plain, tmp_path / "compact")
    items = parquet.read_table(tmp_path / "compact" / ITEMS)
    assert {*items["file"].to_pylist()} == {"testbed_facts.jsonl", "fidelity.jsonl"}
    assert items.schema.field("acc").type == "float" and items.schema.field("kl").type == "double"


def test_both_forms_are_read_and_verified_alike(plain: Path, tmp_path: Path) -> None:
    publish(plain, tmp_path / "compact")
    paths = [*record_paths(plain)], [*record_paths(tmp_path / "compact")]
    assert [path.name for path in paths[0]] == [path.name for path in paths[1]]
    for one, other in zip(*paths, strict=True):
        record = read_record(one)
        assert read_record(other) == record
        assert validate_items(other, record, whole=True) == validate_items(one, record, whole=True)
        assert items_files(items_folder(other)) == items_files(items_folder(one))
    with pytest.raises(FileNotFoundError):
        read_file(paths[1][0].with_name("another.json"))


def edit(path: Path, column: str, row: int, change: Any) -> None:
    table = parquet.read_table(path)
    values = table[column].to_pylist()
    values[row] = change(values[row])
    field = table.schema.field(column)
    index = table.column_names.index(column)
    parquet.write_table(table.set_column(index, field, pyarrow.array(values, field.type)), path)


@pytest.mark.parametrize(
    ("file", "column", "change", "said"),
    [
        (
            RECORDS,
            "scores",
            lambda text: text.replace('"n": 3', '"n": 4'),
            r"w4a4\S+\.json: not what was written: its ",
        ),
        (RECORDS, "spec", lambda text: "{", r"w4a4\S+\.json: "),
        (ITEMS, "acc", lambda acc: 1.0 - acc, r"w4a4\S+/testbed_facts\.jsonl: is not what was written"),
        (ITEMS, "resps", lambda text: '[["other"]]', r"w4a4\S+/testbed_facts\.jsonl: is not what was written"),
        (ITEMS, "resps", lambda text: "[", r"w4a4\S+/testbed_facts\.jsonl: is not what was written"),
    ],
)
def test_an_edited_record_is_named_and_the_others_are_read(
    plain: Path, tmp_path: Path, file: str, column: str, change: Any, said: str
) -> None:
    publish(plain, tmp_path / "compact")
    rows = parquet.read_table(tmp_path / "compact" / file).to_pylist()
    first = next(i for i, row in enumerate(rows) if "w4a4" in row["record"] and row[column] is not None)
    edit(tmp_path / "compact" / file, column, first, change)
    faults, read = [], []
    for path in record_paths(tmp_path / "compact"):
        try:
            validate_items(path, record := read_record(path))
            read.append(record.spec["bits"]["name"])
        except RecordError as error:
            faults.append(str(error))
    assert read == ["w8a8"]
    with pytest.raises(RecordError, match=said):
        raise RecordError(*faults)


def test_files_that_are_damaged_or_missing_are_named(plain: Path, tmp_path: Path) -> None:
    publish(plain, tmp_path / "compact")
    first = next(record_paths(tmp_path / "compact"))
    items, records = (tmp_path / "compact" / name for name in (ITEMS, RECORDS))
    content = items.read_bytes()
    items.write_bytes(content[: len(content) // 2])
    with pytest.raises(RecordError, match=r"items\.parquet: not readable as compact records"):
        validate_items(first, read_record(first))
    records.write_bytes(b"PAR1")
    assert [*record_paths(tmp_path / "compact")] == [records]
    with pytest.raises(RecordError, match=r"records\.parquet: not readable as "):
        read_record(records)
    parquet.write_table(pyarrow.table({"x": [1]}), records)
    with pytest.raises(RecordError, match=r"has no column 'record'"):
        Compact(records)
