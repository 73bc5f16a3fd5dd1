"""Progress bars: the one place that decides whether they are drawn."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from starquant.session.terminal import interactive

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Draws bars on stderr, or none.

    Attributes:
        shown: whether bars are drawn.
    """

    shown: bool = True

    def bar(
        self, iterable: Iterable[T] | None, what: str, unit: str, total: int | None = None, initial: int = 0
    ) -> tqdm[T]:
        """Return a bar that is gone when it is finished.

        Args:
            iterable: what is counted as it is iterated over; None where `update` is called instead.
            what: is under way.
            unit: of the count.
            total: of the count; None takes the iterable's length.
            initial: what of the count was there already.
        """
        return tqdm(iterable, desc=what, unit=unit, total=total, initial=initial, disable=not self.shown, leave=False)


#: Draws nothing: what library functions are called with.
SILENT = Progress(shown=False)


def for_terminal() -> Progress:
    """Return bars where a person watches and TQDM_DISABLE is not set."""
    return Progress(interactive() and os.environ.get("TQDM_DISABLE") != "1")
