"""One record with its items, as tables read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from starquant.config.speed import SpeedSpec
from starquant.errors import RecordError
from starquant.reports.choice import GRID
from starquant.store.columns import TaskColumns
from starquant.store.items import is_fidelity, items_folder, read_columns
from starquant.store.record import RecordHead, Score
from starquant.store.records import read_head
from starquant.store.verification import validate_items

#: Algorithms whose authors have a grid of their own (conf/method): records without `bits.grid` are on the common one.
OWN_GRID = ("smoothquant", "awq", "quarot", "dllmquant_plus", "dllmquant_plus_plus")


@dataclass(frozen=True)
class Run:
    """One record with its items."""

    path: Path
    record: RecordHead

    @classmethod
    def read(cls, path: Path, whole: bool = False) -> Run:
        """Read a record and what tables read of its items, in either form.

        Args:
            path: of the record.
            whole: judge its other items as well; else these by their size, where they are files of their own.

        Raises:
            RecordError: it is not what was written, or not the means of its items.
        """
        run = cls(path, read_head(path))
        if items := validate_items(path, run.record, whole):
            run.__dict__["items"] = items
        return run

    @cached_property
    def items(self) -> dict[str, TaskColumns]:
        """Numbers of every leaf task; raises RecordError when they are missing or damaged."""
        return read_columns(items_folder(self.path))

    def get(self, dotted: str) -> Any:
        """Return a value of the specification, None where there is no such key."""
        here: Any = self.record.spec
        for key in dotted.split("."):
            here = here.get(key) if isinstance(here, dict) else None
        return here

    def has(self, dotted: str) -> bool:
        """Return whether the specification has a key."""
        here: Any = self.record.spec
        for key in dotted.split("."):
            if not isinstance(here, dict) or key not in here:
                return False
            here = here[key]
        return True

    @property
    def grid(self) -> str | None:
        """Whose grid its method is on, "authors" or "common"; None where these are the same."""
        if self.has(GRID):
            return None if self.get("method.authors") is None else str(self.get(GRID))
        return "common" if self.get("method.algorithm") in OWN_GRID else None  # of code that knew no other

    def agrees(self, key: str, value: Any) -> bool:
        """Return whether the specification has this value; one of one grid is on both."""
        return self.grid in (None, value) if key == GRID else bool(self.get(key) == value)

    @property
    def left_out(self) -> dict[str, str]:
        """Tasks that were left out, and why; records that do not say left none."""
        return self.get("tasks.left_out") or {}

    @property
    def speed(self) -> SpeedSpec:
        """The shortcuts of its evaluation; records that do not say have none."""
        return SpeedSpec.model_validate(self.get("speed") or {})

    def matches(self, where: Mapping[str, Any]) -> bool:
        """Return whether the specification has these values; of a key it does not have, None."""
        return all(self.agrees(key, value) for key, value in where.items())

    def score(self, task: str, metric: str | None, filter_name: str | None) -> Score | None:
        """Return a task's score, its first one where no metric is named."""
        for score in self.record.scores:
            named = metric is None or (score.metric == metric and filter_name in (None, score.filter))
            if score.task == task and named:
                return score
        return None

    @property
    def documents(self) -> dict[str, str]:
        """What its record tells of the items of its tasks, and of those read through the hub with their examples."""
        try:
            items = {name: columns.items for name, columns in self.items.items() if not is_fidelity(name)}
        except RecordError:  # an old record without items
            items = {}
        of_hub: dict[str, str] = self.record.provenance.get("documents") or {}
        return {f"items of {leaf}": digest for leaf, digest in items.items()} | {
            f"items and examples of {leaf}": digest for leaf, digest in of_hub.items()
        }

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """What was computed of its items, by task; filled by those who read tables."""
        return {}

    def leaves(self, task: str) -> list[str]:
        """Return a task, or the leaf tasks of a group."""
        return [task] if task in self.items else sorted(name for name in self.items if name.startswith(f"{task}_"))
