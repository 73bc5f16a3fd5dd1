"""Items of a record, as they lie beside it: NAME.items/TASK.jsonl, one row an item or (fidelity) a prompt and step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from starquant.errors import RecordError

#: Columns that are no metrics, beside those that hold no numbers.
_IDENTITY = ("doc_id", "prompt", "step", "mask_ratio", "doc_hash", "target", "filter")


@dataclass(frozen=True)
class Items:
    """One run's rows of one task: values by filter and metric, indexed by item and document digest."""

    path: Path
    rows: pd.DataFrame

    def metrics(self) -> list[tuple[str, str]]:
        """Return (metric, filter) pairs that have numbers."""
        frame = self.rows.drop(columns=["item", "filter", "hash"])
        return [
            (metric, str(name))
            for name in self.rows["filter"].unique()
            for metric in frame.columns
            if frame.loc[self.rows["filter"] == name, metric].notna().any()
        ]

    def values(self, metric: str, filter_name: str) -> pd.Series[float]:
        """Return one number an item, indexed by (item, document digest)."""
        chosen = self.rows[self.rows["filter"] == filter_name].dropna(subset=[metric])
        means: pd.Series[float] = chosen.groupby(["item", "hash"], sort=True)[metric].mean()
        return means


def trajectories_of(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what two specifications must share for their fidelity to be compared, by dotted name."""
    model, fidelity = spec["model"], spec["fidelity"]
    found = {f"model.{name}": model.get(name) for name in ("fingerprint", "dtype", "trajectory")}
    return found | {f"fidelity.{name}": fidelity.get(name) for name in ("source", "positions")}


def items_folder(record: Path) -> Path:
    """Return the folder of a record's items."""
    return record.with_suffix(".items")


def read_items(record: Path, task: str) -> Items:
    """Read the items of one task; raises RecordError when they are missing or damaged."""
    path = items_folder(record) / f"{task}.jsonl"
    return Items(path, pd.DataFrame([_row(path, number, row) for number, row in enumerate(read_raw(record, task), 1)]))


def read_raw(record: Path, task: str) -> list[dict[str, Any]]:
    """Return the rows of one task as they were written.

    Raises:
        RecordError: they are missing or damaged.
    """
    path = items_folder(record) / f"{task}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # answers may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: items cannot be read ({error})") from None
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1)]


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}, line {number}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or not {"doc_id", "prompt"} & row.keys():
        raise RecordError(f"{path}, line {number}: has neither doc_id nor prompt")
    return row


def _row(path: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    key = next(name for name in ("doc_id", "prompt") if name in row)
    metrics = {
        name: float(value)
        for name, value in row.items()
        if name not in _IDENTITY and isinstance(value, int | float) and name in row.get("metrics", (name,))
    }
    bad = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise RecordError(f"{path}, line {number}: {bad} is {metrics[bad]}, not a finite number")
    return {"item": row[key], "hash": row.get("doc_hash", ""), "filter": row.get("filter", "none")} | metrics
