"""Items of a record, as they lie beside it: NAME.items/TASK.jsonl, one row an item or (fidelity) a prompt and step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starquant.store.columns import read_rows

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
