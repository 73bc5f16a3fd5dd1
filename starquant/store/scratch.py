"""A folder below the results for what only a running process needs."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from filelock import FileLock

from starquant.errors import RecordError
from starquant.store.locks import is_held, lock_path


class Scratch:
    """A folder below the results that goes with the run; what killed runs left is removed when one is made.

    Raises:
        RecordError: it cannot be made.
    """

    def __init__(self, results: Path) -> None:
        parent = results / "unfinished"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for left in parent.glob("blocks-*"):
                if not is_held(lock_path(results, "blocks", left.name)):
                    shutil.rmtree(left, ignore_errors=True)
                    lock_path(results, "blocks", left.name).unlink(missing_ok=True)
            self.folder = parent / f"blocks-{uuid.uuid4().hex[:12]}"
            self._lock = FileLock(lock_path(results, "blocks", self.folder.name))
            Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            self.folder.mkdir()
        except OSError as error:
            raise RecordError(f"{parent}: cannot be written: {error.strerror or error}") from error

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
