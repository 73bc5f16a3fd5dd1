"""Who hears of runs. The record on disk is the result; a tracker only shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from starquant.config.run import RunSpec


class Tracker(Protocol):
    """Hears of each record once it is on disk, and of a run that failed."""

    def begin(self, spec: RunSpec) -> None:
        """Start to show a pinned run that is about to be computed; returns at once."""
        ...

    def log(self, figures: Mapping[str, float | str]) -> None:
        """Show figures of the run that was begun, by name; returns at once."""
        ...

    def publish(self, record: Path) -> None:
        """Start telling; returns at once."""
        ...

    def failed(self, spec: RunSpec, error: BaseException) -> None:
        """Start telling that a pinned run ended in an error; returns at once."""
        ...

    def close(self) -> None:
        """Wait for what is still being told, within the tracker's own time limit."""
        ...


class NullTracker:
    """Tells nobody and imports nothing."""

    def begin(self, spec: RunSpec) -> None:
        """Do nothing."""

    def log(self, figures: Mapping[str, float | str]) -> None:
        """Do nothing."""

    def publish(self, record: Path) -> None:
        """Do nothing."""

    def failed(self, spec: RunSpec, error: BaseException) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
