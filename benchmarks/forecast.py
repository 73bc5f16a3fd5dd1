"""A forecast beside what then happened: `dry_run=true` and the run itself, stage by stage, in one go.

Both in processes of their own and a results folder that is new, so that nothing is reused. Peak memory is that of the
run's record. Other work on the cores between the two falls on one of them: run it on a quiet machine.

    python benchmarks/forecast.py method=rtn
    python benchmarks/forecast.py model=smol bits=w4a4 method=quarot tasks=fidelity runtime.threads=1
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from starquant.errors import one_line_errors
from starquant.forecast.forecast import Forecast, forecast
from starquant.forecast.table import in_time
from starquant.sweeps.command_line import plan_of

RUN = Path(__file__).resolve().parents[1] / "run.py"


def forecast_of(words: list[str]) -> Forecast:
    """Return the forecast of a command line's only run."""
    plan = plan_of(words)
    assert plan is not None and len(plan.cells) == 1, "one run"
    return forecast(plan.cells[0].spec)


def seconds_of(results: Path) -> dict[str, float]:
    """Return what the stages of a run took, from its records."""
    seconds: dict[str, float] = {}
    for path in (results / "records").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        took = record["timings"]["seconds"]
        if record["spec"]["method"]["name"] == "none":
            seconds["full precision"] = took["evaluate"]
            seconds.setdefault("evaluate", took["evaluate"])
        else:
            seconds |= took
    return seconds


@one_line_errors(OSError)
def main() -> int:
    """Print forecast, reality and their ratio for every stage of more than a tenth of a second."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*sys.argv[1:], f"paths.results={folder}"]
        ahead = forecast_of(words)
        began = time.perf_counter()
        subprocess.run([sys.executable, str(RUN), *words], check=True, stdout=subprocess.DEVNULL)
        total, took = time.perf_counter() - began, seconds_of(Path(folder))
    rows = [(stage.name, stage.seconds, took.get(stage.name)) for stage in ahead.stages]
    for name, expected, actual in [*rows, ("total", ahead.seconds, total)]:
        if actual is None:
            print(f"{name:16s} {in_time(expected):>10s}")
        elif max(expected, actual) > 0.1:
            print(f"{name:16s} {in_time(expected):>10s} {in_time(actual):>10s} {expected / actual:6.2f} x")
    print(f"the forecast took {in_time(ahead.took)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
