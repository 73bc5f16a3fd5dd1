"""A GGUF's own digest: SHA-256 of the file with the digits of the digest as zeros, held in the file itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starquant.errors import CheckpointError

KEY = "starquant.sha256"
#: In the place of the digest until the file is whole.
BLANK = "0" * 64
_PIECE = 1 << 20


def seal(path: Path) -> None:
    """Put the digest of a file that was written with a blank one into it; raises OSError."""
    place = _place(path)
    assert place is not None, "written without a blank"
    digits = _digest(path, place)
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(digits)


def validate_seal(path: Path) -> None:
    """Compare a whole GGUF with what was written; one without a digest, of earlier code, passes.

    Raises:
        CheckpointError: it is not what was written, or cannot be read.
    """
    try:
        place = _place(path)
        if place is None:
            return
        with path.open("rb") as stream:
            stream.seek(place)
            digits = stream.read(len(BLANK))
        if digits != _digest(path, place):
            raise CheckpointError(f"{path}: is not what was written")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _place(path: Path) -> int | None:
    """Return where in a file its digest lies."""
    import gguf

    field = gguf.GGUFReader(path).fields.get(KEY)
    if field is None:
        return None
    return int(field.offset) + sum(int(part.nbytes) for part in field.parts[:-1])


def _digest(path: Path, place: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        digest.update(stream.read(place))
        stream.seek(len(BLANK), 1)
        digest.update(BLANK.encode())
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest().encode()
