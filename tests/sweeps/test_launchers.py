"""Two real jobs through each launcher, and one run shared by two processes."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from starquant.sweeps.overrides import LAUNCHER_EXTRAS
from tests.support.command_line import RUN, process, run_in_process

RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
QUICK = ("tasks.names=[testbed_facts,testbed_programs]", "tasks.limit=9", "fidelity=none", "runtime.threads=1")


@pytest.mark.parametrize(
    "launcher", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("joblib", "submitit_local")), "ray"]
)
def test_two_jobs(launcher: str, tmp_path: Path) -> None:
    """One good and one that fails: the summary and the exit code do not depend on the launcher."""
    module, extra = LAUNCHER_EXTRAS[launcher]
    if find_spec(module) is None:
        pytest.skip(f"the extra '{extra}' is not installed")
    cells = ("-m", f"launcher={launcher}", "method=none,rtn", "stage=evaluate")
    done = process(*RUN, *cells, *QUICK, f"paths.results={tmp_path}", **RAY)
    assert done.returncode == 1, done.stderr
    assert "2 cells: 1 done, 1 failed" in done.stderr
    assert "failed: tiny:0 w4a4 rtn testbed_facts+testbed_programs (evaluate): " in done.stderr
    assert len(list(tmp_path.glob("records/tiny-w16a16-none-*.json"))) == 1
    sweeps = list(tmp_path.glob("sweeps/*"))
    assert [path.name.split("-")[0] for path in sweeps] == ["sweep"]  # named by its cells, not by the clock


def scores(results: Path, bits: str) -> list[dict[str, Any]]:
    (path,) = results.glob(f"records/tiny-{bits}-*.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())["scores"]
    return found


@pytest.mark.slow  # three processes to the end
def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    """Nine items on two processes: an uneven share, padded by lm-eval; the first one calibrates and writes."""
    options = ("method=smoothquant", "fidelity=testbed", *(o for o in QUICK if not o.startswith("fidelity")))
    alone = run_in_process(*options, results=tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    exported = f"export.dir={tmp_path / 'packed'}"
    both = process(*launch, *RUN[1:], *options, f"paths.results={tmp_path / 'two'}", exported)
    assert both.returncode == 0, both.stderr
    assert both.stderr.count("exported: ") == 1 and (tmp_path / "packed" / "model.safetensors").exists()
    assert both.stderr.count("2 processes share the items of every task") == 1
    for bits in ("w16a16", "w4a4"):
        assert scores(tmp_path / "one", bits) == scores(tmp_path / "two", bits)
    assert both.stderr.count("running: tiny-w4a4-smoothquant") == 1
    assert both.stdout.count("testbed_programs") == 1
