"""Memory that was freed, given back to the machine."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
#: Of a block's linears: 768 experts' weights leave 1.5 GB of holes otherwise, seven large ones fewer.
EVERY = 32


def return_freed() -> None:
    """Give back what the C library keeps of freed memory (glibc; elsewhere nothing is done).

    Buffers of a few MB come from its heap at aligned addresses, where holes of the same size do not serve again.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def returning_freed(items: Iterable[T]) -> Iterator[T]:
    """Yield items; what work on them has freed is given back now and then, and at the end."""
    for count, item in enumerate(items, 1):
        yield item
        if count % EVERY == 0:
            return_freed()
    return_freed()
