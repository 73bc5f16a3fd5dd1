"""How long the stages of a run took, how much memory, on what."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from starquant.store.record import Timings


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Put the seconds that a stage takes under its name."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def timings(seconds: dict[str, float], device: str) -> Timings:
    """Return seconds by stage with the peak memory so far."""
    scale = 1024 if sys.platform != "darwin" else 1  # ru_maxrss: KiB, bytes on macOS
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else None
    return Timings(
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        peak_host_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9,
        peak_device_memory_gb=peak,
    )


def device_name(device: str) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
