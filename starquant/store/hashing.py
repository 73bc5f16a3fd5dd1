"""Files read to their end, in pieces: what they hold, in a digest. The standard library only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

_PIECE = 1 << 20


def pieces(path: Path) -> Iterator[bytes]:
    """Yield what a file holds, a MiB at a time; raises OSError."""
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            yield piece


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, read now; raises OSError."""
    digest = hashlib.sha256()
    for piece in pieces(path):
        digest.update(piece)
    return digest.hexdigest()
