"""What a run says while it is computed: a file of JSON lines that the run appends to and a worker follows.

A file, because writing to it neither waits for a worker that hangs nor fails with one that has died.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

POLL_S = 0.5
#: Between two lines of counts.
COUNTS_S = 2.0
COUNTS = ("requests/", "prompts/", "states/")


class LiveFile:
    """The run's side.

    Args:
        path: of the file; what another run of the same digest left is gone.
        digest: of the run.
        spec: of the run, as in a record.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, digest: str, spec: Mapping[str, Any]) -> None:
        self.path, self.digest = path, digest
        self._counts, self._written = dict[str, float | str](), time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        self._append({"digest": digest, "spec": spec})

    def log(self, figures: Mapping[str, float | str]) -> None:
        """Append figures; counts wait until `COUNTS_S` have passed, the last of a stage is never lost."""
        if all(name.startswith(COUNTS) for name in figures):
            self._counts |= figures
            if time.monotonic() - self._written < COUNTS_S:
                return
            figures = {}
        self._append({"figures": {**self._counts, **figures}})
        self._counts, self._written = {}, time.monotonic()

    def end(self, record: Path | None = None, error: str | None = None) -> None:
        """Append how the run ended: with a record or an error."""
        if self._counts:
            self._append({"figures": self._counts})
        self._append({"record": None if record is None else str(record), "error": error})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def follow(path: Path, run: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run as they come, up to its end; a run that is gone without one has ended in an error.

    Args:
        path: of the file.
        run: id of the run's process, the parent of this one; as the run has it, which may be gone by now.
    """
    unread = ""
    with path.open(encoding="utf-8") as stream:
        while True:
            alone = os.getppid() != run  # looked at before reading: what it wrote last is read
            unread += stream.read()
            *whole, unread = unread.split("\n")
            for text in whole:
                line: dict[str, Any] = json.loads(text)
                yield line
                if "error" in line:
                    return
            if alone:
                yield {"record": None, "error": "the process of the run has died"}
                return
            time.sleep(POLL_S)
