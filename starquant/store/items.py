"""Items of a record, as they lie beside it: NAME.items/TASK.jsonl, one row an item or (fidelity) a prompt and step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starquant.errors import RecordError
from starquant.store.columns import FILE, TaskColumns, columns_in, columns_of
from starquant.store.source import items_files, read_file

#: What fidelity is called where tasks are; of a group of its texts, fidelity_GROUP.
FIDELITY = "fidelity"


def is_fidelity(task: str) -> bool:
    """Return whether a score or items are of fidelity, of all its texts or of a group."""
    return task == FIDELITY or task.startswith(f"{FIDELITY}_")


def trajectories_of(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what two specifications must share for their fidelity to be compared, by dotted name."""
    model, fidelity = spec["model"], spec["fidelity"]
    shared = {f"model.{name}": model.get(name) for name in ("fingerprint", "dtype", "trajectory")}
    return shared | {f"fidelity.{name}": fidelity.get(name) for name in ("source", "states", "positions")}


def items_folder(record: Path) -> Path:
    """Return the folder of a record's items."""
    return record.with_suffix(".items")


def read_raw(record: Path, task: str) -> list[dict[str, Any]]:
    """Return the rows of one task as they were written; raises RecordError when they are missing or damaged."""
    return read_rows(items_folder(record) / f"{task}.jsonl")


def read_columns(folder: Path) -> dict[str, TaskColumns]:
    """Return the numbers of every leaf task, from the `.jsonl` files where they were not kept.

    Args:
        folder: NAME.items of a record.

    Raises:
        RecordError: items that are missing or damaged.
    """
    names = items_files(folder) or []
    if FILE not in names:
        return rows_columns(folder)
    try:
        return columns_in(read_file(folder / FILE))
    except (OSError, ValueError) as error:
        way = "; delete it, it is made again of the items beside it" if len(names) > 1 else ""
        raise RecordError(f"{folder / FILE}: not readable ({str(error).splitlines()[0]}){way}") from None


def rows_columns(folder: Path) -> dict[str, TaskColumns]:
    """Return the numbers of every leaf task as its rows say them, whatever was kept; raises as `read_columns`."""
    names = [name for name in items_files(folder) or () if name != FILE]
    if not names:
        raise RecordError(f"{folder}: the items of the record cannot be read (there are none)")
    return {name.removesuffix(".jsonl"): _from_rows(folder / name) for name in names}


def _from_rows(path: Path) -> TaskColumns:
    try:
        return columns_of(read_rows(path))
    except ValueError as error:
        raise RecordError(f"{path}: {error}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return one task's rows as they were written.

    Raises:
        RecordError: they are missing or damaged.
    """
    try:
        lines = read_file(path).decode().removesuffix("\n").split("\n")  # answers may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: items cannot be read ({error})") from None
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1)]


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits among them
        raise RecordError(f"{path}, line {number}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or not {"doc_id", "prompt"} & row.keys():
        raise RecordError(f"{path}, line {number}: has neither doc_id nor prompt")
    return row
