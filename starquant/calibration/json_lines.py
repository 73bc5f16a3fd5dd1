"""Local files of text and of JSON Lines, read in pieces: regular files only, every line judged.

A line may not hold what readers of JSON differ on: a key twice, NaN, numbers beyond 64 bits, lone surrogates, another
encoding than UTF-8.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from starquant.errors import DataError

MOST_BYTES = 16 << 20  # of a line
MOST_DEPTH = 64  # of objects and lists in one another
PIECE = 1 << 20  # bytes read at once
_DIGITS = 20  # of a 64-bit number, with its sign
_BEFORE_UTF8 = {
    codecs.BOM_UTF8: "UTF-8 with a mark",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "gzip",
}


@contextmanager
def opened(path: Path, place: str) -> Iterator[IO[bytes]]:
    """Open a regular file, decompressed where its name ends in .gz; `place` is what an error names.

    Raises:
        DataError: no such file, anything but a regular one (a pipe would hang, a device never ends), a damaged gzip.
    """
    with os.fdopen(_descriptor(path, place), "rb") as stream:
        try:
            if path.suffix == ".gz":
                with gzip.open(stream, "rb") as content:
                    yield content
            else:
                yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{place}: damaged gzip file ({error})") from None
        except OSError as error:
            raise DataError(f"{place}: cannot be read: {error.strerror}") from None


def _descriptor(path: Path, place: str) -> int:
    try:
        # Opening a pipe waits for its writer unless it is said not to.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataError(f"{place}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DataError(f"{place}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
    raise DataError(f"{place}: cannot be read: it is {kind}, allowed: a regular file")


def pieces(path: Path, place: str) -> Iterator[bytes]:
    """Yield a file's content, some bytes at a time.

    Raises:
        DataError: as `opened`, and nothing but white space in it.
    """
    blank = True
    with opened(path, place) as stream:
        while piece := stream.read(PIECE):
            blank = blank and not piece.strip()
            yield piece
    if blank:
        raise DataError(f"{place}: holds no text")


def validate_text(path: Path, place: str) -> int:
    """Judge a text file to its end and return how many bytes it has.

    Raises:
        DataError: as `pieces`, and text that is not UTF-8, with its line.
    """
    decoder, size, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    try:
        for piece in pieces(path, place):
            if size == 0:
                _refuse_mark(piece, f"{place}, line 1")
            decoder.decode(piece)
            size, line = size + len(piece), line + piece.count(b"\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise DataError(f"{place}, line {line}: not UTF-8 ({error.reason})") from None
    return size


def lines(path: Path, place: str) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and content of every line of a file, its end of line with it.

    Raises:
        DataError: as `opened`, and a line longer than `MOST_BYTES`.
    """
    offset = number = 0
    with opened(path, place) as stream:
        while line := stream.readline(MOST_BYTES + 1):
            number += 1
            if len(line) > MOST_BYTES:
                raise DataError(f"{place}, line {number}: longer than {MOST_BYTES >> 20} MiB, which no item is")
            yield offset, line
            offset += len(line)


def items_lines(path: Path, place: str) -> Iterator[tuple[int, str, bytes]]:
    """Yield offset, place and content of every line that holds an item; empty ones may stand at the end only.

    Raises:
        DataError: as `lines`, and an empty line before another one.
    """
    blank = 0
    for number, (offset, line) in enumerate(lines(path, place), 1):
        if not line.strip():
            blank = blank or number
        elif blank:
            raise DataError(f"{place}, line {blank}: not valid JSON (it is empty)")
        else:
            yield offset, f"{place}, line {number}", line


def parse_object(line: bytes, place: str) -> dict[str, Any]:
    """Return the JSON object that a line holds.

    Raises:
        DataError: anything else, with the place.
    """
    _refuse_mark(line, place)
    if not line.strip():
        raise DataError(f"{place}: not valid JSON (it is empty)")
    try:
        text = line.decode("utf-8")
        item = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite, parse_int=_whole
        )
        if "\\u" in text:  # the one way to write half a pair
            json.dumps(item, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 ({error.reason})") from None
    except UnicodeEncodeError:
        raise DataError(f"{place}: holds a lone surrogate, which is no text") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg}, character {error.pos + 1})") from None
    except RecursionError:
        raise DataError(f"{place}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise DataError(f"{place}: {error}") from None
    if not isinstance(item, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(item).__name__}")
    if _is_deep(item):
        raise DataError(f"{place}: nested more than {MOST_DEPTH} deep")
    return item


def _refuse_mark(beginning: bytes, place: str) -> None:
    for mark, name in _BEFORE_UTF8.items():
        if beginning.startswith(mark):
            raise DataError(f"{place}: not UTF-8 ({name}), allowed: UTF-8 without a mark")


def _is_deep(item: Any) -> bool:
    level = [item]
    for _ in range(MOST_DEPTH):
        level = [
            part
            for whole in level
            if isinstance(whole, dict | list)
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
    return bool(level)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        times = Counter(name for name, _ in pairs)
        twice = next(name for name in times if times[name] > 1)
        raise ValueError(f"field {twice[:80]!r} stands twice")
    return item


def _no_number(name: str) -> float:
    raise ValueError(f"holds {name}, which is no number")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"holds {digits[:40]}, which is beyond a 64-bit number")
    return number


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS or not -(2**63) <= (number := int(digits)) < 2**63:
        raise ValueError(f"holds {digits[:40]}, which is beyond a 64-bit number")
    return number
