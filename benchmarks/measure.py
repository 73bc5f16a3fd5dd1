"""Honest timing: alternate the candidates, take medians."""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

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


def energy_meter(device: str) -> Callable[[], float] | None:
    """Return what reads the joules that a GPU has taken so far (NVML's counter); None where it reports none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        uuid = f"GPU-{str(torch.cuda.get_device_properties(device).uuid).removeprefix('GPU-')}"
    except (OSError, AttributeError, AssertionError, RuntimeError, ValueError):
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1000

    return None if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) else read


def joules(work: Callable[[], object], meter: Callable[[], float] | None, seconds: float = 1.0) -> float | None:
    """Return the energy of a call, which returns when its work is done; None without a meter.

    So many are made in a row that a counter which moves every tenth of a second tells them.
    """
    if meter is None:
        return None
    began, before, calls = time.perf_counter(), meter(), 0
    while time.perf_counter() - began < seconds or not calls:
        work()
        calls += 1
    return (meter() - before) / calls


#: Parts of a forward by what its kernels' names hold: this project's, then those of the library.
KERNELS = {
    "in front": ("_transform_rows", "_quantize_rows", "_map_rows"),
    "products": ("_linear", "_finish", "nvjet", "gemm", "cutlass", "splitK"),
    "heads": ("_turn",),
    "attention": ("sdpa", "flash", "fmha"),
}


def by_kernel(work: Callable[[], object], repeats: int = 3) -> dict[str, float]:
    """Return the milliseconds that a GPU's kernels take in one call, by part (`KERNELS`), `rest` being all others.

    A kernel that begins early (`kernels.triton.launch`) counts what it waits, so that parts would exceed the whole.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    parts = dict.fromkeys((*KERNELS, "rest"), 0.0)
    for event in profile.key_averages():
        part = next((part for part, names in KERNELS.items() if any(name in event.key for name in names)), "rest")
        parts[part] += event.self_device_time_total / 1000 / repeats
    return {part: round(ms, 4) for part, ms in parts.items()}


def private_bytes() -> int:
    """Return the memory of this process that no file backs (RssAnon; Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("error: /proc/self/status: has no RssAnon; private memory is measured on Linux alone")


class PeakMemory:
    """Largest growth of memory while the context lasts, in MiB: of the process (looked at every 5 ms), or of a GPU.

    Args:
        device: of which.
        private: of the process, only what no file backs.
    """

    def __init__(self, device: str = "cpu", private: bool = False) -> None:
        self.mib, self._gpu, self._done = 0.0, device.startswith("cuda"), threading.Event()
        self._held = private_bytes if private else lambda: psutil.Process().memory_info().rss

    def __enter__(self) -> PeakMemory:
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._baseline = torch.cuda.memory_allocated()
        else:
            self._baseline = self._held()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.mib = max(self.mib, (self._held() - self._baseline) / 2**20)

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            self.mib = (torch.cuda.max_memory_allocated() - self._baseline) / 2**20
        else:
            self._done.set()
            self._thread.join()
