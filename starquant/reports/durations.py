"""How long a run took, in all and stage by stage, in one line."""

from __future__ import annotations

from collections.abc import Mapping

from starquant.store.record import Timings

#: Stages that take less are not shown.
SHOWN_S = 0.05


def in_time(seconds: float) -> str:
    """Return seconds in the unit that a reader wants."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def took(timings: Timings, beside: Mapping[str, float | None] | None = None) -> str:
    """Return what took how long: "12.0 s in all: load 1.0 s, evaluate 11.0 s (gsm8k 10.0 s)".

    Args:
        timings: of a record.
        beside: seconds of what no record has by the name that is shown, added to the sum; None: it was not done.
    """
    others = {name: seconds for name, seconds in (beside or {}).items() if seconds is not None}
    stages = {name: seconds for name, seconds in timings.seconds.items() if "/" not in name} | others
    return f"{in_time(timings.total_s + sum(others.values()))} in all: " + ", ".join(
        f"{name} {in_time(seconds)}{_parts(timings, name)}" for name, seconds in stages.items() if seconds >= SHOWN_S
    )


def _parts(timings: Timings, stage: str) -> str:
    parts = {k.partition("/")[2]: s for k, s in timings.seconds.items() if k.startswith(f"{stage}/")}
    return f" ({', '.join(f'{name} {in_time(seconds)}' for name, seconds in parts.items())})" if parts else ""
