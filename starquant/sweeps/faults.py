"""What is wrong with the cells of a sweep: every fault once, however many cells have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starquant.errors import ConfigError, StarquantError

#: Faults that are shown; of a sweep over thousands of bad values, the first ones tell enough.
MOST = 10


class CompositionError(ConfigError):
    """Words that do not compose: of the whole command line, so that no other cell is looked at."""


class Faults:
    """Errors of cells, by their text."""

    def __init__(self) -> None:
        self._cells: Counter[str] = Counter()

    @contextmanager
    def of_a_cell(self) -> Iterator[None]:
        """Keep an error of the user for the end."""
        try:
            yield
        except CompositionError:
            raise
        except StarquantError as error:
            self._cells.update(dict.fromkeys(str(error).splitlines(), 1))

    def validate(self) -> None:
        """Raise ConfigError, a line a fault, where there is any."""
        if not self._cells:
            return
        lines = [f"{line} ({count} cells)" if count > 1 else line for line, count in self._cells.items()]
        more = len(lines) - MOST
        raise ConfigError("\n".join(lines[:MOST] + ([f"and {more} more faults of this sweep"] if more > 0 else [])))
