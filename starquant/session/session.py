"""The session of a process: what its runs are given beside their specification, and what they keep for each other."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starquant.session.logs import PACKAGE
from starquant.session.processes import ALONE, Processes, processes
from starquant.session.progress import SILENT, Progress
from starquant.session.tracker import NullTracker, Tracker


@dataclass(frozen=True)
class Code:
    """The code that runs.

    Attributes:
        git_sha: None outside git.
        git_dirty: whether code or configuration differ from it; None outside git.
        scoring: digest of what a score can depend on.
        fitting: digest of what a calibration can depend on.
    """

    git_sha: str | None
    git_dirty: bool | None
    scoring: str
    fitting: str


@dataclass
class Memory:
    """What the runs of a session keep for each other.

    Attributes:
        code: as the first run started; what is committed meanwhile is not what runs. None until then.
        records: that were computed: with reuse=never a sweep still computes full precision once.
        tasks: suites that have been judged, and digests of their items, leaf by leaf.
        references: the last fidelity reference, by what it depends on.
    """

    code: Code | None = None
    records: set[Path] = field(default_factory=set)
    tasks: dict[str, dict[str, str]] = field(default_factory=dict)
    references: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Session:
    """Where runs happen and who hears of them.

    Attributes:
        device: a torch device; each run puts its own here.
        processes: that share the run.
        progress: bars.
        log: of what runs say.
        tracker: hears of the runs; a NullTracker gives way to the tracker that each run's specification names.
        memory: shared by all runs of the session.
    """

    device: str = "cpu"
    processes: Processes = ALONE
    progress: Progress = SILENT
    log: logging.Logger = field(default_factory=lambda: logging.getLogger(f"{PACKAGE}.runs"))
    tracker: Tracker = field(default_factory=NullTracker)
    memory: Memory = field(default_factory=Memory)

    @classmethod
    def open(cls, progress: Progress = SILENT) -> Session:
        """Return a new session among the processes that this one was started with; the first alone draws bars."""
        together = processes()
        return cls(processes=together, progress=progress if together.first else SILENT)

    @property
    def code(self) -> Code:
        """The code that runs, once a run has started."""
        assert self.memory.code is not None, "a run takes it as it starts"
        return self.memory.code
