"""Bounds on what one call may take, and what it may end with: success or an error of the user in one line."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hypothesis import HealthCheck, Phase, settings

from starquant.errors import StarquantError

SECONDS, MEMORY = 10, 2 << 30


def fuzzed(examples: int) -> settings:
    """Settings of a fuzz test: the same examples each time, or as many others as STARQUANT_FUZZ says."""
    more = os.environ.get("STARQUANT_FUZZ")
    return settings(
        max_examples=int(more) if more else examples,
        derandomize=more is None,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),  # explaining traces every line, tenfold slower
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError after `SECONDS`, and MemoryError where `MEMORY` more is allocated."""

    def late(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {SECONDS} s")

    before, ceiling = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as stream:
        size = int(stream.read().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, ceiling))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (before, ceiling))


def succeeds(action: Callable[[], object]) -> bool:
    """Whether an action succeeds; it may fail with an error of the user in one readable line, and with nothing else."""
    try:
        with bounded():
            action()
    except StarquantError as error:
        message = str(error)
        assert message.strip() and len(message.splitlines()) == 1 and len(message) < 2000, message
        return False
    return True
