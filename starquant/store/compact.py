"""Records in the compact form: two Parquet files that read as the records and items files they were made of.

`FOLDER/records.parquet` has a row a record: its name, its items files with their number of rows, and a column of JSON
for each of its keys. `FOLDER/items.parquet` has a row a line of these files, in their order, and a column for each key
of the lines. `records.parquet` stands where a folder of records would: FOLDER/records.parquet/NAME.json is a record
of it, FOLDER/records.parquet/NAME.items/TASK.jsonl its items. Items files come back byte for byte, so that seals hold.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from starquant.errors import RecordError
from starquant.store.columns import FILE as COLUMNS
from starquant.store.columns import columns_of, columns_text

RECORDS, ITEMS = "records.parquet", "items.parquet"
#: Columns of items that say whose line it is, and hold one whole that does not come back from its keys.
RECORD, FILE, LINE = "record", "file", "line"
#: Columns of records: the items files, and the text of a record that does not come back from its keys.
NAME, FILES, TEXT = "record", "items files", "text"
#: Mark of a column whose values are JSON.
JSON = {b"json": b"true"}


class Compact:
    """The records of one `records.parquet`.

    Args:
        path: of it, with `items.parquet` beside it where any record has items.

    Raises:
        RecordError: a file that cannot be read, or is no compact form of records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = {str(row.pop(NAME)): row for row in _table(path, (NAME, FILES)).to_pylist()}
        self._files: dict[str, dict[str, int | None]] = {}
        self._first: dict[tuple[str, str], int] = {}
        first = 0
        try:
            for name, row in self._records.items():
                self._files[name] = json.loads(row.pop(FILES))
                for file, count in self._files[name].items():
                    self._first[name, file] = first
                    first += count or 0
        except (ValueError, TypeError, AttributeError) as error:
            raise RecordError(f"{path}: not readable as compact records ({error})") from None

    @functools.cached_property
    def _items(self) -> Any:
        return _table(self.path.with_name(ITEMS), (RECORD, FILE))

    @property
    def names(self) -> list[str]:
        """The names of the records, without .json, in the order of their files' names."""
        return sorted(self._records, key=lambda name: f"{name}.json")

    def record(self, name: str) -> str:
        """Return a record as JSON; raises KeyError where there is none of the name."""
        row = self._records[name]
        if (text := row.get(TEXT)) is not None:
            return str(text)
        return "{" + ", ".join(f"{json.dumps(key)}: {text}" for key, text in row.items() if text is not None) + "}"

    def items_files(self, name: str) -> list[str]:
        """Return the names of a record's items files; raises KeyError where there is no such record."""
        return sorted(self._files[name], key=lambda file: (file == COLUMNS, file))

    def items_file(self, name: str, file: str) -> str:
        """Return an items file as it was; raises KeyError where there is none of the name."""
        count = self._files[name][file]
        if count is None:
            return derived({other: self.items_file(name, other) for other in _sources(file, self._files[name])}, file)
        rows = rows_of(self._items.slice(self._first[name, file], count))
        return text_of(file, rows)


@functools.lru_cache(maxsize=8)
def _opened(path: Path, size: int, changed: int) -> Compact:
    return Compact(path)


def opened(path: Path) -> Compact:
    """Return the records of a `records.parquet`, read once as long as the file does not change; raises RecordError."""
    try:
        stat = path.stat()
    except OSError as error:
        raise RecordError(f"{path}: not readable as compact records ({error.strerror})") from None
    return _opened(path, stat.st_size, stat.st_mtime_ns)


def _table(path: Path, wanted: tuple[str, ...]) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pyarrow.ArrowException) as error:
        raise RecordError(f"{path}: not readable as compact records ({' '.join(str(error).split())})") from None
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise RecordError(f"{path}: no compact records (has no column '{missing[0]}')")
    return table


def rows_of(table: Any) -> list[dict[str, Any]]:
    """Return rows of `items.parquet` as the lines that they were, keys in the order of the columns."""
    columns: dict[str, list[Any]] = {}
    for name in table.column_names:
        if name not in (RECORD, FILE) and table[name].null_count < len(table):
            field = table.schema.field(name)
            read = json.loads if JSON.items() <= (field.metadata or {}).items() else READ.get(str(field.type))
            values = table[name].to_pylist()
            columns[name] = [... if value is None else read(value) if read else value for value in values]
    return [{name: v for name, values in columns.items() if (v := values[i]) is not ...} for i in range(len(table))]


def short(number: float) -> float:
    """Return the number of six digits that half the bits stand for."""
    return float(f"{number:.6g}")


#: How values of a column are read, by its type; as they are where it is not listed.
READ = {"float": short}


def text_of(file: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return an items file of its rows."""
    rows = [*rows]
    if rows and LINE in rows[0]:
        return "".join(row[LINE] for row in rows)
    if file == COLUMNS:
        return columns_text(_tasks(rows))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _tasks(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of all tasks, whose rows have `task`, `items` and one number a metric."""
    tasks: dict[str, Any] = {}
    for row in rows:
        task = tasks.setdefault(row["task"], {"items": row["items"], "n": 0, "values": {}})
        task["n"] += 1
        for name, number in row.items():
            if name not in ("task", "items"):
                task["values"].setdefault(name, []).append(number)
    return tasks


def number_rows(text: str) -> list[dict[str, Any]]:
    """Return the numbers of all tasks as rows, of which `text_of` makes the same."""
    return [
        {"task": task, "items": numbers["items"], **{name: values[i] for name, values in numbers["values"].items()}}
        for task, numbers in json.loads(text)["tasks"].items()
        for i in range(numbers["n"])
    ]


def _sources(file: str, files: Iterable[str]) -> list[str]:
    """Return the items files that a derived one is made of."""
    if file == COLUMNS:
        return [other for other in files if other != COLUMNS]
    return [f"{file.removesuffix('.jsonl').rpartition('_')[0]}.jsonl"]


def derived(sources: Mapping[str, str], file: str) -> str:
    """Return an items file that is made of others: numbers of all tasks, or the lines of one group (TASK_GROUP).

    Raises:
        ValueError: numbers that are not finite, lines that are no JSON.
    """
    if file == COLUMNS:
        rows_by_task = {name.removesuffix(".jsonl"): map(json.loads, _lines(text)) for name, text in sources.items()}
        return columns_text({task: columns_of(rows).model_dump() for task, rows in rows_by_task.items()})
    (text,), group = sources.values(), file.removesuffix(".jsonl").rpartition("_")[2]
    return "".join(f"{line}\n" for line in _lines(text) if json.loads(line).get("group") == group)


def derivable(texts: Mapping[str, str], file: str) -> bool:
    """Return whether an items file is what `derived` makes of the others beside it."""
    sources = {name: texts[name] for name in _sources(file, texts) if name in texts and name != file}
    try:
        return bool(sources) and derived(sources, file) == texts[file]
    except (ValueError, TypeError, AttributeError):
        return False


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n")  # answers may hold U+2028
