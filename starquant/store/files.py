"""Writing whole files or none, and putting damaged ones out of the way."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def set_aside(path: Path, why: str) -> Path:
    """Rename a damaged file or folder to NAME.damaged (.1, .2, ...) and say so; nothing is deleted."""
    taken = [path.with_name(f"{path.name}.damaged")]
    while taken[-1].exists():
        taken.append(path.with_name(f"{path.name}.damaged.{len(taken)}"))
    try:
        path.rename(taken[-1])
    except FileNotFoundError:  # another process was first
        return taken[-1]
    log.warning("%s; set aside as %s and computed again", why, taken[-1].name)
    return taken[-1]
