"""Cells that are not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starquant.sweeps.cell_log import CellEntry
from starquant.sweeps.cells import Cell


@dataclass
class Runner:
    """Stands for `sweeps.jobs.CellRunner`: `work` takes the place of a run."""

    work: Callable[[Cell], CellEntry | None]
    command: str = "of the test"

    def __call__(self, cell: Cell) -> CellEntry | None:
        return self.work(cell)


def done(cell: Cell, **more: object) -> CellEntry:
    """The entry of a cell that has been run."""
    return CellEntry(key=cell.key, name=cell.name, state="done", **more)
