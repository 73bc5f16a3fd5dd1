"""A validated plan, run: what each of its cells has come to by this command, and the exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.utils import env_override

from starquant.errors import RecordError, StarquantError
from starquant.runs.preflight import validate_paths, validate_results
from starquant.session.processes import launched_rank
from starquant.session.terminal import interactive
from starquant.sweeps.cell_log import CellEntry, CellLog
from starquant.sweeps.cells import Plan, left_out_of
from starquant.sweeps.faults import Faults
from starquant.sweeps.jobs import PARENT, forecast_cells
from starquant.sweeps.launchers import validate_machine
from starquant.sweeps.progress import SweepBar, summary

PACKAGE = Path(__file__).resolve().parents[1]
#: Starts the cells of a plan; returns what became of them, one after the other.
Start = Callable[[], Sequence[CellEntry | None]]


def run(plan: Plan, start: Start, command: str) -> int:
    """Run what is validated; returns the exit code: 0 when every cell is brought to its end, 2 when each is refused.

    Args:
        plan: the cells.
        start: runs them here, or through Hydra's launcher.
        command: by which cells say which command ran them.

    Raises:
        ConfigError: cells that cannot be run, a line a fault, before the first one is.
        ConsentError: a task that needs consent is named without it, or nothing else would be scored.
        RecordError: the results folder cannot be written.
    """
    left_out, dry = left_out_of(plan), plan.cells[0].spec.dry_run
    if plan.sweep and not dry:
        validate_machine(plan)
    if not dry:
        validate_cells(plan)
        validate_results(plan.cells[0].spec)
    for task, why in left_out.items() if not launched_rank() else ():
        print(f"note: {task} is left out: it {why}", file=sys.stderr, flush=True)
    if dry:
        return 1 if forecast_cells(plan.cells) else 0
    log = CellLog(plan.results)
    environment = {}
    if plan.launcher != "basic":
        environment["TQDM_DISABLE"] = "1"  # bars of several processes would overwrite each other
    if plan.launcher.startswith("joblib"):
        environment[PARENT] = str(os.getpid())
    with env_override(environment), SweepBar(log, plan.cells, enabled=plan.sweep and interactive()):
        returned = _started(start, plan)
    if launched_rank():
        return 0
    entries = _entries(plan, returned, log, command)
    if plan.sweep:
        print(summary(entries), file=sys.stderr, flush=True)
    done = returned is not None and all(entry.state == "done" for entry in entries)
    if not done and returned is not None:
        _set_aside(plan)
    if all(entry.state == "refused" for entry in entries):
        return 2  # nothing was run
    return 0 if done and _is_shown(plan, entries) else 1


def validate_cells(plan: Plan) -> None:
    """Judge every cell by what it reads, before the first one runs; raises ConfigError, a line a fault."""
    faults = Faults()
    for cell in plan.cells:
        with faults.of_a_cell():
            validate_paths(cell.spec)  # before torch is imported
    faults.validate()
    from starquant.runs.judgement import Judge

    judge = Judge(here=plan.launcher == "basic")
    for cell in plan.cells:
        with faults.of_a_cell():
            judge.validate(cell.spec)
    faults.validate()


def _started(start: Start, plan: Plan) -> Sequence[CellEntry | None] | None:
    """Return what became of the cells, None where the launcher could not start them, or lost a worker."""
    try:
        return start()
    except StarquantError:
        raise
    except Exception as error:  # of the launcher: its settings, or a worker that was killed
        if launched_rank() is not None:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        if plan.cells[0].spec.debug.traceback or Path(frames[-1].filename).is_relative_to(PACKAGE):
            traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        print(f"error: launcher={plan.launcher}: {type(error).__name__}: {first}", file=sys.stderr, flush=True)
        return None


def _entries(plan: Plan, returned: Sequence[CellEntry | None] | None, log: CellLog, command: str) -> list[CellEntry]:
    """Return how each cell ended in this command; one that an earlier command has finished is missing."""
    if returned is None:
        read = [log.read(cell.key, cell.name) for cell in plan.cells]
        returned = [entry if entry.command == command else None for entry in read]
    padded = [*returned, *[None] * len(plan.cells)]
    return [
        entry if isinstance(entry, CellEntry) else CellEntry(key=cell.key, name=cell.name, state="missing")
        for cell, entry in zip(plan.cells, padded, strict=False)
    ]


def _set_aside(plan: Plan) -> None:
    """Set aside what the experiment showed before cells of it failed: records may be others by now."""
    if plan.experiment is None:
        return
    from starquant.reports.experiments import set_all_aside

    try:
        stale = set_all_aside(plan.experiment, plan.results)
    except OSError as error:
        raise RecordError(f"{plan.experiment}: cannot be set aside: {error}") from error
    for path in stale:
        print(f"note: {path.name} is of an earlier time: set aside as {path.name}.stale", file=sys.stderr, flush=True)


def _is_shown(plan: Plan, entries: Sequence[CellEntry]) -> bool:
    """Build what an experiment shows, or the page of other runs; returns whether an experiment's is there."""
    if plan.experiment is None:
        pairs = zip(plan.cells, entries, strict=True)
        scored = [plan.results / one.record for cell, one in pairs if cell.spec.is_scored and one.record is not None]
        if scored:
            from starquant.reports.page.experiment import show_runs

            show_runs(scored, plan.results, plan.name if len(scored) > 1 else scored[0].stem)
    if plan.experiment is None or all(cell.spec.stage == "calibrate" for cell in plan.cells):
        return True
    from starquant.reports.after_sweep import after_sweep

    limits = {cell.spec.tasks.limit for cell in plan.cells}
    try:
        limit = limits.pop() if len(limits) == 1 else None
        made = {Path(entry.record).name for entry in entries if entry.record is not None}
        return after_sweep(plan.experiment, plan.results, limit, made)
    except OSError as error:
        raise RecordError(f"{plan.experiment}: cannot be written: {error}") from error
