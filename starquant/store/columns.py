"""The numbers of a run's items, task by task and metric by metric: what tables read, many records at a time.

`NAME.items/columns.json` holds for each task a digest of its items (two runs with the same digest are paired by
position), and one list of numbers for each "metric,filter"; of fidelity, every prompt's mean over denoising steps.
It is made of the `.jsonl` files beside it, which stay the full account.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from starquant.store.files import write_atomically

FILE = "columns.json"
SCHEMA_VERSION = 1
#: Keys that are no metrics, beside those that hold no numbers.
IDENTITY = ("doc_id", "prompt", "step", "mask_ratio", "doc_hash", "target", "filter")


class TaskColumns(BaseModel):
    """The numbers of one task.

    Attributes:
        items: digest of the items, in order.
        n: how many there are.
        values: "metric,filter" to one number an item.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    items: str
    n: int
    values: dict[str, list[float]]

    @model_validator(mode="after")
    def _validate_lengths(self) -> TaskColumns:
        for name, numbers in self.values.items():
            if len(numbers) != self.n:
                raise ValueError(f"{name} has {len(numbers)} numbers for {self.n} items")
        return self


class _Columns(BaseModel):
    schema_version: int
    tasks: dict[str, TaskColumns]


def columns_of(rows: Iterable[Mapping[str, Any]]) -> TaskColumns:
    """Return the numbers of one task's rows; a metric that some items do not have is left out.

    Raises:
        ValueError: a number that is not finite.
    """
    by_metric: dict[str, dict[tuple[Any, str], list[float]]] = {}
    items: set[tuple[Any, str]] = set()
    for number, row in enumerate(rows, 1):
        key = next((name for name in ("doc_id", "prompt") if name in row), None)
        if key is None:
            continue
        item = (row[key], str(row.get("doc_hash", ""))[:12])
        items.add(item)
        wanted = row.get("metrics")
        for name, value in row.items():
            if name in IDENTITY or not isinstance(value, int | float) or (wanted is not None and name not in wanted):
                continue
            if not math.isfinite(value):
                raise ValueError(f"line {number}: {name} is {value}, not a finite number")
            by_item = by_metric.setdefault(f"{name},{row.get('filter', 'none')}", {})
            by_item.setdefault(item, []).append(float(value))
    order = sorted(items)
    means = {
        name: [float(f"{sum(by_item[item]) / len(by_item[item]):.9g}") for item in order]
        for name, by_item in by_metric.items()
        if len(by_item) == len(order)
    }
    digest = hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16]
    return TaskColumns(items=digest, n=len(order), values=means)


def write_columns(folder: Path, items: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the numbers of all tasks beside their items; a task with numbers that are not finite has none."""
    tasks = {}
    for task, rows in items.items():
        with contextlib.suppress(ValueError):
            tasks[task] = columns_of(rows).model_dump()
    keep_columns(folder, tasks)


def keep_columns(folder: Path, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write numbers that have been taken from their items already."""
    write_atomically(folder / FILE, columns_text(tasks))


def columns_text(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the file that holds the numbers of all tasks."""
    return json.dumps({"schema_version": SCHEMA_VERSION, "tasks": tasks}) + "\n"


def columns_in(text: bytes) -> dict[str, TaskColumns]:
    """Return the numbers of all tasks that a file holds; raises ValueError where it is damaged."""
    content = _Columns.model_validate_json(text)
    if content.schema_version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {content.schema_version}")
    return content.tasks
