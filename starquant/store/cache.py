"""The user's cache: what can be made again, and what is known of large files. No torch."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from pathlib import Path

from starquant.errors import ConfigError
from starquant.session.progress import for_terminal
from starquant.store.hashing import pieces

log = logging.getLogger(__name__)

#: What is known of large files, in the cache.
DIGESTS = "digests.json"
#: Entries that are kept, the last ones.
_MOST = 1000
#: Bytes that take a while to read.
_LONG = 1 << 28
#: A file that was touched so shortly before it was read may be written again without a trace in its times, as git has
#: it of racily clean files.
RACY_SECONDS = 2.0

#: Device, inode, size, and nanoseconds of the last change of content and of anything.
Identity = tuple[int, int, int, int, int]


def cache_folder() -> Path:
    """Return the folder of this package in the user's cache: $STARQUANT_CACHE, else starquant/ in $XDG_CACHE_HOME or
    ~/.cache; raises ConfigError where nothing says where that is.
    """
    named, shared = os.environ.get("STARQUANT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(os.path.expanduser(named))
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "starquant"
    except RuntimeError:
        raise ConfigError("STARQUANT_CACHE: not set, and no home folder is known; set it to a folder") from None


def is_writable(folder: Path) -> bool:
    """Return whether files can be written in a folder, once it is made if it is not there."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:
        return False


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, read to its end once while its times, size and place stay as they are.

    What was computed is kept in CACHE/digests.json, where that can be written.

    Raises:
        OSError: the file cannot be read.
    """
    path, now = path.resolve(), time.time()
    identity = _identity(path)
    if now - max(identity[3:]) / 1e9 < RACY_SECONDS:
        return _read(path)
    key = ":".join(map(str, identity))
    digest = _remembered().get(key)
    if digest is None:
        digest = _read_once(path, identity)
        if _identity(path) == identity:
            _remember(key, digest)
    return digest


def _identity(path: Path) -> Identity:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache(maxsize=_MOST)
def _read_once(path: Path, _: Identity) -> str:
    """Read a file as it is known by its times: no cache may be there to be written."""
    return _read(path)


def _read(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    level = logging.INFO if size >= _LONG else logging.DEBUG
    log.log(level, "reading %s to its end (%.1f GB): it is known by its content", path.name, size / 1e9)
    with for_terminal().bar(None, path.name, "MB", total=size >> 20) as bar:
        for piece in pieces(path):
            digest.update(piece)
            bar.update(len(piece) >> 20)
    return digest.hexdigest()


def _remembered() -> dict[str, str]:
    """Return what is known; nothing where there is no cache, or none that can be read."""
    try:
        kept = json.loads((cache_folder() / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, ConfigError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {key: digest for key, digest in kept.items() if isinstance(digest, str) and len(digest) == 64}


def _remember(key: str, digest: str) -> None:
    from starquant.store.files import write_atomically  # and pydantic, which a bare machine lacks

    kept = _remembered() | {key: digest}
    try:
        write_atomically(cache_folder() / DIGESTS, json.dumps(dict(list(kept.items())[-_MOST:]), indent=0) + "\n")
    except (OSError, ConfigError) as error:
        log.debug("digests of large files are not kept: %s", error)
