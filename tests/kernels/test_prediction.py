"""The predictor of a GPU's times, judged by the forwards that were measured on one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "efficiency.py"


def test_measured_forwards_are_predicted_within_a_quarter() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--predict", "H100"], capture_output=True, text=True, timeout=100, check=True
    )
    old, new = done.stdout.split("this code", 1)
    errors = [int(percent) for percent in re.findall(r"\| ([+-]\d+)% \|", old)]
    assert len(errors) == 8 and max(map(abs, errors)) <= 25
    assert "predicted, not measured" in new and new.count("| llada |") == new.count("| dream |") == 6
