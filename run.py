"""Command line: `python run.py model=llada bits=w4a4`. Hydra composes and launches, `starquant` judges and runs.

A configuration is validated before torch is imported; what became of every cell is kept in files, so that the summary
of a sweep is the same whichever launcher ran it.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

# Internal errors keep their whole traceback; errors of the user never reach Hydra's own printing.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
INTERACTIVE = sys.stderr.isatty() and not os.environ.get("CI")
if not INTERACTIVE:
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars too

import hydra
from omegaconf import DictConfig

from starquant.composing import CONF, Cell, Plan, plan, sweepable
from starquant.errors import StarquantError
from starquant.preflight import check_paths, check_results
from starquant.processes import launched_rank
from starquant.records.cells import CellEntry, CellLog
from starquant.watching import SweepBar, summary


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def cell(config: DictConfig) -> None:
    """Run one cell; an error is kept for the end, so that a sweep goes on."""
    this = Cell.of(config)
    if launched_rank():  # of several processes the first one tells
        _run(this)
        return
    log = CellLog(Path(this.spec.paths.results))
    try:
        with log.running(this.key, this.name) as outcome:
            outcome.append(_run(this))
    except StarquantError as error:
        if this.spec.debug.traceback:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
    except Exception:
        traceback.print_exc()


def _run(this: Cell) -> CellEntry:
    """Run a cell and print its report; returns what became of it."""
    check_paths(this.spec)  # before torch is imported
    from starquant.pipeline import execute
    from starquant.tables.report import render

    results = Path(this.spec.paths.results)
    result = execute(this.spec, progress=os.environ.get("TQDM_DISABLE") != "1")
    if not launched_rank():
        if result.record is None or result.baseline is None:
            print(f"wrote: {result.path}", flush=True)
        else:
            print(render(result.record, result.baseline, result.path), flush=True)
    result.tracker.close()
    record = result.path.relative_to(results).as_posix()
    return CellEntry(key=this.key, name=this.name, state="done", record=record, reused=result.reused)


def launch(planned: Plan, arguments: list[str]) -> int:
    """Hand the cells to Hydra; returns how many did not end well."""
    results = Path(planned.cells[0].spec.paths.results)
    log = CellLog(results)
    if planned.launcher != "basic":
        os.environ["TQDM_DISABLE"] = "1"  # bars of several processes would overwrite each other
    extra = []
    if planned.sweep and not any(a.startswith("hydra.sweep.dir=") for a in arguments):
        extra.append(f"hydra.sweep.dir={results / 'sweeps' / planned.name}")
    sys.argv[1:] = [*sweepable(arguments), *extra]
    shown = planned.sweep and INTERACTIVE
    with SweepBar(log, planned.cells, enabled=shown):
        cell()
    entries = [log.read(one.key, one.name) for one in planned.cells]
    if planned.sweep:
        print(summary(entries), file=sys.stderr, flush=True)
    return sum(entry.state != "done" for entry in entries)


def main() -> None:
    """Judge, run, and say by the exit code whether every cell ended well."""
    arguments = sys.argv[1:]
    try:
        planned = plan(arguments)
        if planned is None:
            cell()
            return
        check_results(planned.cells[0].spec)
        failed = launch(planned, arguments)
        if planned.experiment is not None and not failed and not launched_rank():
            from starquant.tables.experiments import after_sweep

            after_sweep(planned.experiment, Path(planned.cells[0].spec.paths.results))
    except StarquantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
