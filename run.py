"""Command line: `python run.py model=llada bits=w4a4`. Hydra composes and launches, `starquant` judges and runs.

A configuration is validated before torch is imported; what became of every cell is kept in files, so that the summary
of a sweep is the same whichever launcher ran it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

# Internal errors keep their whole traceback; errors of the user never reach Hydra's own printing.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
INTERACTIVE = sys.stderr.isatty() and not os.environ.get("CI")
if not INTERACTIVE:
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars too

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from starquant.errors import StarquantError
from starquant.runs.preflight import validate_paths, validate_results
from starquant.session.logs import on_terminal
from starquant.session.processes import launched_rank
from starquant.session.session import of_process
from starquant.sweeps.cell_log import CellEntry, CellLog
from starquant.sweeps.cells import CONF, Cell, Plan, plan, sweepable
from starquant.sweeps.progress import SweepBar, summary

#: Names the process that started a sweep, to its workers on this machine.
PARENT = "STARQUANT_SWEEP_PID"
LAUNCHERS = ("hydra", "omegaconf", "joblib", "submitit", "ray")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def cell(config: DictConfig) -> None:
    """Run one cell; an error is kept for the end, so that a sweep goes on."""
    end_with_parent()
    this = Cell.of(config)
    if launched_rank():  # of several processes the first one tells
        with contextlib.suppress(StarquantError), on_terminal(shown=False):
            _run(this)
        return
    with on_terminal():
        _logged(this)


def _logged(this: Cell) -> None:
    """Run a cell and write down what became of it."""
    log = CellLog(Path(this.spec.paths.results))
    try:
        with log.running(this.key, this.name) as outcome:
            outcome.append(_run(this))
    except StarquantError as error:
        if this.spec.debug.traceback:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
    except (Exception, SystemExit):  # a library may ask to exit
        if launched_rank() is not None:  # the other processes wait for this one: all must end
            raise
        traceback.print_exc()


def end_with_parent() -> None:
    """Let a worker of this machine end when the process that started the sweep does (Linux)."""
    if os.environ.get(PARENT, str(os.getpid())) != str(os.getpid()) and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _run(this: Cell) -> CellEntry:
    """Run a cell and print its report; returns what became of it."""
    validate_paths(this.spec)  # before torch is imported
    from starquant.reports.run_table import render
    from starquant.runs.execute import execute

    results = Path(this.spec.paths.results)
    result = execute(this.spec, of_process())
    if not launched_rank():
        if result.record is None or result.baseline is None:
            print(f"wrote: {result.path}", flush=True)
        else:
            print(render(result.record, result.baseline, result.path), flush=True)
    result.tracker.close()
    record = result.path.relative_to(results).as_posix() if result.path.exists() else None
    return CellEntry(key=this.key, name=this.name, state="done", record=record, reused=result.reused)


def launch(planned: Plan, arguments: list[str]) -> int:
    """Hand the cells to Hydra; returns how many did not end well."""
    results = Path(planned.cells[0].spec.paths.results)
    log = CellLog(results)
    if planned.launcher != "basic":
        os.environ["TQDM_DISABLE"] = "1"  # bars of several processes would overwrite each other
    if planned.launcher.startswith("joblib"):
        os.environ[PARENT] = str(os.getpid())
    extra = []
    if planned.sweep and not any(a.startswith("hydra.sweep.dir=") for a in arguments):
        extra.append(f"hydra.sweep.dir={results / 'sweeps' / planned.name}")
    flags = [a for a in arguments if a.startswith("-") and "=" not in a]
    sys.argv[1:] = [*flags, *sweepable([a for a in arguments if a not in flags], planned.sweep), *extra]
    with SweepBar(log, planned.cells, enabled=planned.sweep and INTERACTIVE):
        try:
            cell()
        except StarquantError:
            raise
        except Exception as error:  # of the launcher: its settings, or a worker that was killed
            if launched_rank() is not None:
                raise
            if type(error).__module__.split(".")[0] not in LAUNCHERS:
                traceback.print_exc()
            first = next(iter(str(error).strip().splitlines()), "")
            print(f"error: launcher={planned.launcher}: {type(error).__name__}: {first}", file=sys.stderr, flush=True)
    if launched_rank():
        return 0
    entries = [log.read(one.key, one.name) for one in planned.cells]
    if planned.sweep:
        print(summary(entries), file=sys.stderr, flush=True)
    return sum(entry.state != "done" for entry in entries)


def terminated(*_: object) -> None:
    """End as after Ctrl-C, which ends workers as well."""
    raise KeyboardInterrupt("SIGTERM")


def main() -> None:
    """Judge, run, and say by the exit code whether every cell ended well."""
    arguments = sys.argv[1:]
    signal.signal(signal.SIGTERM, terminated)
    try:
        planned = plan(arguments)
        if planned is None:
            cell()
            return
        validate_results(planned.cells[0].spec)
        failed = launch(planned, arguments)
        if planned.experiment is not None and not failed and not launched_rank():
            from starquant.reports.experiments import after_sweep

            after_sweep(planned.experiment, Path(planned.cells[0].spec.paths.results))
    except StarquantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except HydraException as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print("interrupted: what is finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(143 if error.args else 130)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
