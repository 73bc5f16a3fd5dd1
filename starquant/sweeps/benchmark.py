"""An experiment that is a benchmark: a script of benchmarks/ measures on a GPU, and its table is printed."""

from __future__ import annotations

import subprocess
import sys

from starquant.errors import ConfigError
from starquant.session.devices import leased
from starquant.sweeps.cells import Plan
from starquant.sweeps.overrides import CONF

#: What a benchmark takes of a command line.
KEYS = ("experiment", "runtime.device", "paths.results")


def measure(plan: Plan) -> int:
    """Run the plan's benchmark into its results folder; returns the exit code. What is there is not measured again.

    Raises:
        ConfigError: a key that benchmarks do not read, a device that is no GPU or not there, no benchmarks/ (a wheel).
    """
    spec, name = plan.cells[0].spec, plan.experiment
    for word in plan.overrides[0]:
        key = word.partition("=")[0]
        if key not in KEYS:
            raise ConfigError(f"{key}: experiment={name} does not read it; allowed: {', '.join(KEYS)}")
    device, script = spec.runtime.device, CONF.parent / "benchmarks" / f"{plan.benchmark}.py"
    if not script.is_file():
        raise ConfigError(f"experiment={name}: measures with benchmarks/{plan.benchmark}.py, which a checkout has")
    if not device.startswith("cuda"):
        raise ConfigError(
            f"runtime.device: got '{device}', allowed: a GPU for experiment={name} (cuda, cuda:1, cuda:free)"
        )
    from starquant.runs.judgement import validate_device_here

    validate_device_here(device)
    folder = plan.results / "efficiency"
    with leased(device) as free:
        options = ["--device", free, "--out", str(folder / f"{name}.json")]
        code = subprocess.run([sys.executable, str(script), *options]).returncode
    if code == 0:
        from starquant.reports import efficiency

        code = efficiency.main([str(folder)])
    return code
