"""What became of each cell of a sweep: one small JSON file a cell, whichever process ran it.

A cell is named by the digest of what was asked for (before checkpoints and data are looked at). A cell whose file says
"running" while nobody holds its lock has died.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from starquant.errors import RecordError, StarquantError
from starquant.store.files import write_atomically
from starquant.store.locks import exclusive, is_held, lock_path

State = Literal["missing", "running", "died", "done", "failed", "refused"]


class CellEntry(BaseModel):
    """What became of a cell.

    Attributes:
        key: digest of what was asked for.
        name: model, bits, method, tasks.
        state: where it stands.
        record: path of its record below the results folder, of a finished one.
        reused: whether the record was there already.
        error: of a failed one, and of one that is refused before it computes anything, or would be, one line.
        seconds: it took.
        command: that ran it, each by a name of its own; None of one that is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    name: str
    state: State
    record: str | None = None
    reused: bool = False
    error: str | None = None
    seconds: float | None = None
    command: str | None = None


def failed(key: str, name: str, error: BaseException) -> CellEntry:
    """Return the entry of a cell that an error has ended, or refused before it computed anything."""
    kind = "" if isinstance(error, StarquantError) else f"{type(error).__name__}: "
    line = kind + next(iter(str(error).strip().splitlines()), "")
    refused = isinstance(error, StarquantError) and error.refused
    return CellEntry(key=key, name=name, state="refused" if refused else "failed", error=line)


class CellLog:
    """The cells below one results folder."""

    def __init__(self, results: Path) -> None:
        self.results = results

    def _path(self, key: str) -> Path:
        return self.results / "cells" / f"{key}.json"

    def _lock(self, key: str) -> Path:
        return lock_path(self.results, "cell", key)

    @contextmanager
    def running(self, key: str, name: str, command: str | None = None) -> Iterator[list[CellEntry]]:
        """Hold a cell; the last entry that the caller appends is kept, as of `failed` when an exception passes.

        Args:
            key: of the cell.
            name: of the cell.
            command: that runs it.

        Raises:
            RecordError: the results folder cannot be written.
        """
        with exclusive(self._lock(key), name):
            began, outcome = time.perf_counter(), list[CellEntry]()
            if self.read(key, name).state != "done":  # a finished cell stays so while it is looked at again
                self._write(CellEntry(key=key, name=name, state="running", command=command))
            try:
                yield outcome
            except (Exception, SystemExit) as error:  # kept for the summary, then goes on its way
                outcome.append(failed(key, name, error))
                raise
            finally:
                if outcome:
                    seconds = round(time.perf_counter() - began, 3)
                    self._write(outcome[-1].model_copy(update={"seconds": seconds, "command": command}))

    def _write(self, entry: CellEntry) -> None:
        path = self._path(entry.key)
        try:
            write_atomically(path, json.dumps(entry.model_dump(mode="json"), indent=1) + "\n")
        except OSError as error:
            raise RecordError(f"{path}: cannot be written: {error.strerror or error}") from error

    def read(self, key: str, name: str) -> CellEntry:
        """Return how a cell stands; a finished one whose record is gone is missing, a damaged file is no file."""
        missing = CellEntry(key=key, name=name, state="missing")
        entry = self._load(key)
        if entry is not None and entry.state == "running" and not is_held(self._lock(key)):
            entry = self._load(key)  # it may have ended between the two looks
            if entry is not None and entry.state == "running":
                return entry.model_copy(update={"state": "died"})
        if entry is None or (entry.state == "done" and entry.record and not (self.results / entry.record).exists()):
            return missing
        return entry

    def _load(self, key: str) -> CellEntry | None:
        try:
            return CellEntry.model_validate(json.loads(self._path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError):
            return None
