"""A sweep as a person sees it: one bar while it runs, a summary in the end; both read the cells' files."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from tqdm import tqdm

from starquant.sweeps.cell_log import CellEntry, CellLog, State

POLL_S = 1.0
ORDER: tuple[State, ...] = ("done", "failed", "died", "refused", "running", "missing")


class _Cell(Protocol):
    @property
    def key(self) -> str: ...

    @property
    def name(self) -> str: ...


class SweepBar:
    """A bar over the cells of a sweep, whichever processes run them.

    Args:
        log: where cells say how they stand.
        cells: of the sweep.
        enabled: False draws nothing.
    """

    def __init__(self, log: CellLog, cells: Sequence[_Cell], enabled: bool) -> None:
        self._log, self._cells, self._enabled = log, cells, enabled
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SweepBar:
        if self._enabled:
            started = [entry.model_dump() for entry in self._entries()]
            self._thread = threading.Thread(target=self._watch, args=(started,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _entries(self) -> list[CellEntry]:
        return [self._log.read(cell.key, cell.name) for cell in self._cells]

    def _watch(self, started: list[dict[str, object]]) -> None:
        with tqdm(total=len(self._cells), desc="sweep", unit="cell", position=1, leave=False) as bar:
            while not self._done.wait(POLL_S):
                entries = self._entries()
                # A cell whose file has not changed has not been looked at in this sweep.
                new = [e for e, recorded in zip(entries, started, strict=True) if e.model_dump() != recorded]
                bar.n = sum(entry.state in ("done", "failed", "refused") for entry in new)
                failed = sum(entry.state == "failed" for entry in new)
                bar.set_postfix_str((f"{failed} failed, " if failed else "") + ", ".join(_running(new)))


def _running(entries: Sequence[CellEntry]) -> list[str]:
    return [entry.name for entry in entries if entry.state == "running"]


def summary(entries: Sequence[CellEntry]) -> str:
    """Return how a sweep ended: one line of counts, and one for each cell that did not end well."""
    counts = Counter(entry.state for entry in entries)
    reused = sum(entry.reused for entry in entries if entry.state == "done")
    parts = [f"{counts[state]} {state}" for state in ORDER if counts[state]]
    if reused:
        parts[0] += f" ({reused} there already)"
    lines = [f"{len(entries)} cells: {', '.join(parts)}"]
    for entry in entries:
        if entry.state != "done":
            lines.append(f"  {entry.state}: {entry.name}" + (f": {entry.error}" if entry.error else ""))
    return "\n".join(lines)
