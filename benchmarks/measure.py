"""Honest timing: alternate the candidates, take medians."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable

import psutil
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
    return {name: statistics.median(durations) for name, durations in times.items()}


def machine() -> str:
    """Describe where the figures come from."""
    return f"{os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads, torch {torch.__version__}"


class PeakMemory:
    """Largest growth of memory while the context lasts, in MiB: of the process (looked at every 5 ms), or of a GPU."""

    def __init__(self, device: str = "cpu") -> None:
        self.mib, self._gpu, self._done = 0.0, device.startswith("cuda"), threading.Event()

    def __enter__(self) -> PeakMemory:
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._baseline = torch.cuda.memory_allocated()
        else:
            self._baseline = psutil.Process().memory_info().rss
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.005):
            self.mib = max(self.mib, (process.memory_info().rss - self._baseline) / 2**20)

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            self.mib = (torch.cuda.max_memory_allocated() - self._baseline) / 2**20
        else:
            self._done.set()
            self._thread.join()
