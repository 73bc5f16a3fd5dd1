"""Honest timing: alternate the candidates, take medians."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch


def alternate(candidates: dict[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Run the candidates in turn `repeats` times after `warmup` rounds; return each one's median seconds."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(warmup + repeats):
        for name, candidate in candidates.items():
            began = time.perf_counter()
            candidate()
            if round_index >= warmup:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    """Describe where the figures come from."""
    return f"{os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads, torch {torch.__version__}"
