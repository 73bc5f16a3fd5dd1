"""How much memory tensors take at most while something runs, counted allocation by allocation."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the largest sum of CPU tensors that `run` had allocated and not yet given back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    assert most > 0, "nothing was counted"
    return most
