"""Writing whole files or none, what was written of one, and putting damaged ones out of the way."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from starquant.errors import RecordError
from starquant.store.hashing import file_digest

log = logging.getLogger(__name__)


class FileEntry(BaseModel):
    """What was written of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Read a file to its end."""
        digest = file_digest(path)
        return cls(size=path.stat().st_size, sha256=digest)

    @classmethod
    def of_bytes(cls, content: bytes) -> FileEntry:
        """Describe what a file holds."""
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def validate_content(self, path: Path, content: bytes) -> None:
        """Compare what a file holds with what was written; raises RecordError where it is another one."""
        if FileEntry.of_bytes(content) != self:
            raise RecordError(f"{path}: is not what was written")

    def validate_file(self, path: Path, whole: bool = True) -> None:
        """Compare a file with what was written; only its size where it is not read as a whole.

        Raises:
            RecordError: it is missing, of another kind, or another one.
        """
        try:
            if not path.is_file():
                raise RecordError(f"{path}: is missing")
            if path.stat().st_size != self.size or (whole and FileEntry.of(path) != self):
                raise RecordError(f"{path}: is not what was written")
        except OSError as error:
            raise RecordError(f"{path}: cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Let what fails while a file is written be of that file: errors of a full disk name none, others a temporary one.

    Raises:
        OSError: of the file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it into place; text as UTF-8.

    Raises:
        OSError: it cannot be written; of the file itself, whatever step fails.
    """
    with errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def set_aside(path: Path, why: str, beside: Path | None = None) -> Path:
    """Rename a damaged file or folder to NAME.damaged (.1, .2, ...) and say so; nothing is deleted.

    Args:
        path: of what is damaged.
        why: it is, for the user.
        beside: what belongs to it and is renamed alike, where it is there.
    """
    ending, number = ".damaged", 0
    while any(one.with_name(one.name + ending).exists() for one in (path, beside or path)):
        number += 1
        ending = f".damaged.{number}"
    target = path.with_name(path.name + ending)
    try:
        path.rename(target)
        if beside is not None and beside.exists():
            beside.rename(beside.with_name(beside.name + ending))
    except FileNotFoundError:  # another process was first
        return target
    log.warning("%s; set aside as %s and computed again", why, target.name)
    return target
