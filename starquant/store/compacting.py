"""Writing records in the compact form of `starquant.store.compact`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from starquant.store.columns import FILE as COLUMNS
from starquant.store.compact import (
    FILE,
    FILES,
    ITEMS,
    JSON,
    LINE,
    NAME,
    RECORD,
    RECORDS,
    TEXT,
    derivable,
    number_rows,
    rows_of,
    short,
    text_of,
)
from starquant.store.files import write_atomically

Rows = list[dict[str, Any]]
#: Of zstd, its highest but those that need more memory to read.
LEVEL = 19
KINDS = {bool: "bool_", int: "int64", float: "float64", str: "string"}


@dataclass(frozen=True)
class RecordFiles:
    """A record and its items files as texts.

    Attributes:
        name: of the record, without .json.
        record: its file.
        items: its items files, by name.
    """

    name: str
    record: str
    items: Mapping[str, str]


def plain_text(data: Mapping[str, Any]) -> str:
    """Return the file of a record as runs write it; raises ValueError for numbers that are not finite."""
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def write_compact(folder: Path, records: Sequence[RecordFiles]) -> list[Path]:
    """Write `items.parquet`, then `records.parquet`; returns their paths.

    What does not come back byte for byte of typed columns is kept as it is.

    Raises:
        OSError: they cannot be written.
    """
    records = [dataclasses.replace(one, items=_in_order(one.items)) for one in records]
    files = {
        (one.name, file): None if derivable(one.items, file) else text
        for one in records
        for file, text in one.items.items()
    }
    kept = {key: text for key, text in files.items() if text is not None}
    items, rows_by_file = _items_table(kept)
    lines = []
    for one in records:
        counts = {file: None if files[one.name, file] is None else rows_by_file[one.name, file] for file in one.items}
        lines.append({NAME: one.name, FILES: json.dumps(counts)} | _record_row(one.record))
    paths = [folder / ITEMS, folder / RECORDS]
    write_atomically(paths[0], _parquet(items))
    write_atomically(paths[1], _parquet(_table(lines)))
    return paths


def _in_order(items: Mapping[str, str]) -> dict[str, str]:
    """Return items files in the order of the tasks in their numbers, which are then made of the others."""
    try:
        tasks = [*json.loads(items[COLUMNS])["tasks"]]
    except (ValueError, KeyError, TypeError):
        tasks = []
    order = {f"{task}.jsonl": place for place, task in enumerate(tasks)}
    return dict(sorted(items.items(), key=lambda item: (order.get(item[0], len(order)), item[0] == COLUMNS)))


def _record_row(text: str) -> dict[str, str]:
    """Return a record's keys with their JSON, or its text where they do not make it."""
    try:
        data = json.loads(text)
        if plain_text(data) == text and not {NAME, FILES, TEXT} & data.keys():
            return {key: json.dumps(value) for key, value in data.items()}
    except (ValueError, AttributeError):
        pass
    return {TEXT: text}


def _items_table(texts: Mapping[tuple[str, str], str]) -> tuple[Any, dict[tuple[str, str], int]]:
    """Return the rows of all items files as one table, and how many each file has."""
    whole: set[tuple[str, str]] = set()
    while True:
        rows_by_file = {
            key: [{LINE: line} for line in _lines(text)] if key in whole else _parsed(key[1], text)
            for key, text in texts.items()
        }
        table = _table(
            [{RECORD: name, FILE: file} | row for (name, file), rows in rows_by_file.items() for row in rows],
            [(RECORD, FILE), *dict.fromkeys(tuple(row) for rows in rows_by_file.values() for row in rows)],
        )
        other, first = set(), 0
        for key, rows in rows_by_file.items():
            if text_of(key[1], rows_of(table.slice(first, len(rows)))) != texts[key]:
                other.add(key)
            first += len(rows)
        if not other - whole:
            return table, {key: len(rows) for key, rows in rows_by_file.items()}
        whole |= other


def _parsed(file: str, text: str) -> Rows:
    """Return the rows of an items file; whole lines where it holds something else."""
    try:
        rows = number_rows(text) if file == COLUMNS else [json.loads(line) for line in _lines(text)]
        if all(row.keys().isdisjoint((RECORD, FILE, LINE)) for row in rows):
            return rows
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return [{LINE: line} for line in _lines(text)]


def _lines(text: str) -> list[str]:
    *whole, rest = text.split("\n")
    return [f"{line}\n" for line in whole] + ([rest] if rest else [])


def _table(rows: Rows, orders: Iterable[tuple[str, ...]] = ()) -> Any:
    """Return rows as a table, a column of one kind of values typed, others as JSON; the orders of keys come first."""
    import pyarrow

    names: list[str] = []
    for order in (*orders, *dict.fromkeys(tuple(row) for row in rows)):
        place = 0
        for name in order:
            if name in names:
                place = names.index(name) + 1
            else:
                names.insert(place, name)
                place += 1
    fields, arrays = [], []
    for name in names:
        values, kind = [row.get(name, ...) for row in rows], _kind([row[name] for row in rows if name in row])
        coded = kind is None
        values = [None if value is ... else json.dumps(value) if coded else value for value in values]
        kind = "float32" if kind == "float64" and _are_short(values) else kind
        of_kind = getattr(pyarrow, kind or "string")()
        fields.append(pyarrow.field(name, of_kind, metadata=JSON if coded else None))
        arrays.append(pyarrow.array(values, of_kind))
    return pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields))


def _are_short(values: Iterable[float | None]) -> bool:
    """Return whether numbers come back of half their bits."""
    import numpy as np

    numbers = [value for value in values if value is not None]
    with np.errstate(over="ignore"):
        halves = np.array(numbers, dtype=np.float64).astype(np.float32).tolist()
    return all(short(half) == number for half, number in zip(halves, numbers, strict=True))


def _kind(values: Sequence[Any]) -> str | None:
    """Return the type of a column that holds such values; None where none does, and they are kept as JSON."""
    kinds = {type(value) for value in values}
    kind = KINDS.get(kinds.pop()) if len(kinds) == 1 else None
    return None if kind == "int64" and not all(-(2**63) <= value < 2**63 for value in values) else kind


def _parquet(table: Any) -> bytes:
    """Return a table as a Parquet file: one row group, so that what repeats over records is kept once."""
    from pyarrow import parquet

    numbers = [field.name for field in table.schema if str(field.type) in ("double", "float")]
    out = BytesIO()
    parquet.write_table(
        table,
        out,
        row_group_size=max(len(table), 1),
        use_dictionary=[name for name in table.column_names if name not in numbers],
        column_encoding=dict.fromkeys(numbers, "BYTE_STREAM_SPLIT"),
        compression="zstd",
        compression_level=LEVEL,
        data_page_size=2**26,
        dictionary_pagesize_limit=2**26,
        write_page_checksum=True,
        write_statistics=False,
    )
    return out.getvalue()
