"""One cell as a job, in whichever process a launcher runs it; what became of it is kept in the cell's file."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starquant.errors import StarquantError, show_error
from starquant.runs.preflight import validate_paths
from starquant.session.logs import on_terminal
from starquant.session.processes import launched_rank
from starquant.session.progress import for_terminal
from starquant.session.session import Session
from starquant.sweeps.cell_log import CellEntry, CellLog, failed
from starquant.sweeps.cells import Cell

#: Names the process that started a sweep, to its workers on this machine.
PARENT = "STARQUANT_SWEEP_PID"


@dataclass
class CellRunner:
    """Runs cells as jobs; those that one process runs share a session.

    Attributes:
        session: opened with the first cell.
        command: names the command that runs them.
        in_worker: this is a copy that a launcher sent to a worker process.
    """

    session: Session | None = field(default=None, compare=False)
    command: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    in_worker: bool = field(default=False, init=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process without the session, which is this one's."""
        return {"session": None, "command": self.command, "in_worker": True}

    def __call__(self, cell: Cell) -> CellEntry | None:
        """Run one cell; an error is kept for the end, so that a sweep goes on.

        Returns:
            What became of it; None from all processes of a run but the first.
        """
        end_with_parent()
        if self.session is None:
            self.session = _worker_session() if self.in_worker else Session.open(for_terminal())
        if launched_rank():  # of several processes the first one tells
            with contextlib.suppress(StarquantError), on_terminal(shown=False):
                execute_cell(cell, self.session)
            return None
        with on_terminal():
            return _run_logged(cell, self.session, self.command)


@functools.cache
def _worker_session() -> Session:
    """Return the session of this worker process: each job brings a copy of the runner, so that none can own it."""
    return Session.open(for_terminal())


def _run_logged(cell: Cell, session: Session, command: str) -> CellEntry:
    """Run a cell, write down what became of it, and return that."""
    log = CellLog(cell.results)
    try:
        with log.running(cell.key, cell.name, command) as outcome:
            outcome.append(execute_cell(cell, session))
        return outcome[-1]
    except StarquantError as error:
        if cell.spec.debug.traceback:
            traceback.print_exc()
        show_error(error)
        return failed(cell.key, cell.name, error)
    except (Exception, SystemExit) as error:  # a library may ask to exit
        if launched_rank() is not None:  # the other processes wait for this one: all must end
            raise
        traceback.print_exc()
        return failed(cell.key, cell.name, error)


def end_with_parent() -> None:
    """Let a worker of this machine end when the process that started the sweep does (Linux)."""
    if os.environ.get(PARENT, str(os.getpid())) != str(os.getpid()) and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def forecast_cells(cells: Sequence[Cell]) -> int:
    """Print the forecast of every cell, and of all of them; returns how many would be refused."""
    from starquant.forecast.forecast import forecast
    from starquant.forecast.table import render
    from starquant.reports.durations import in_time

    seconds, refused = 0.0, 0
    for number, cell in enumerate(cells):
        try:
            expected = forecast(cell.spec, first=number == 0)
        except StarquantError as error:
            refused += 1
            show_error(error)
            continue
        seconds += expected.seconds
        print(render(expected), end="\n\n" if len(cells) > 1 else "\n", flush=True)
    if len(cells) > 1:
        print(f"{len(cells) - refused} cells, one after the other: {in_time(seconds)}", flush=True)
    return refused


def execute_cell(cell: Cell, session: Session) -> CellEntry:
    """Run a cell and print its report; returns what became of it."""
    validate_paths(cell.spec)  # before torch is imported
    from starquant.reports.run_table import render
    from starquant.runs.execute import execute

    result = execute(cell.spec, session)
    if not launched_rank():
        if result.record is None:
            if cell.spec.stage == "inspect":
                from starquant.reports.activations import render as render_activations

                print(render_activations(result.path), flush=True)
            print(f"wrote: {result.path}", flush=True)
        else:
            print(render(result.record, result.baseline, result.path, result.export_s), flush=True)
    result.tracker.close()
    record = result.path.relative_to(cell.results).as_posix() if result.path.exists() else None
    return CellEntry(key=cell.key, name=cell.name, state="done", record=record, reused=result.reused)
