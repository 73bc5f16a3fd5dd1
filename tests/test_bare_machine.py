"""Kernels, models and what loads a packed checkpoint need torch, transformers and nothing of the program's own."""

from __future__ import annotations

import subprocess
import sys

from tests.support.paths import REPOSITORY

ABSENT = ("pydantic", "hydra", "omegaconf", "wandb", "lm_eval", "datasets", "pandas", "submitit", "ray")
CODE = f"""
import importlib.machinery, sys
found = importlib.machinery.PathFinder.find_spec
def without(name, path=None, target=None):
    return None if name.split('.')[0] in {ABSENT!r} else found(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(without)
sys.path[:0] = ['benchmarks']
import starquant.packed, starquant.packed.completion, starquant.packed.description
import starquant.diffusion, starquant.kernels
import efficiency
sys.argv = 'efficiency --shape small --families llada --precisions w4a4 --lengths 64 --batches 1 '.split()
efficiency.main()
"""


def test_the_benchmark_runs_where_only_torch_and_transformers_are() -> None:
    run = [sys.executable, "-c", CODE]
    done = subprocess.run(run, capture_output=True, text=True, timeout=200, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "llada w4a4          eager    forward" in done.stdout
