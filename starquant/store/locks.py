"""File locks: two runs that want the same thing compute it once. The kernel releases the lock of a killed process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from starquant.errors import RecordError

log = logging.getLogger(__name__)


def lock_path(results: Path, kind: str, key: str) -> Path:
    """Return the lock file of one thing below a results folder."""
    return results / "locks" / f"{kind}-{key}.lock"


def wait_for(lock: BaseFileLock, what: str) -> None:
    """Take a lock; says once that it waits, and for what. Raises OSError where its file cannot be written."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info("waiting: another process is at %s", what)
        lock.acquire()


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; says once that it waits, and for what.

    Raises:
        RecordError: the lock file cannot be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        wait_for(lock, what)
    except OSError as error:
        raise RecordError(f"{path}: cannot be locked: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Return whether another process holds a lock file."""
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return True
    lock.release()
    return False
