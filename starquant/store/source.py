"""Where records and their items are read from: folders as runs write them, or their compact form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from starquant.errors import RecordError
from starquant.store.columns import FILE
from starquant.store.compact import RECORDS, opened


def record_paths(folder: Path) -> Iterator[Path]:
    """Yield the records below a folder, in the order of their names; nothing of what lies beside them.

    Of a results folder, those in its `records/`, never those published below it. Records of a compact form that
    cannot be read are one path, its own.
    """
    folder = folder / "records" if (folder / "records").is_dir() else folder
    for root, folders, files in os.walk(folder):
        beside = {"activations", "published" if root == str(folder) else ""}
        folders[:] = sorted(name for name in folders if ".items" not in name and name not in beside)
        for name in sorted(files):
            if name == RECORDS:
                yield from _compact_paths(Path(root, name))
            elif name.endswith(".json"):
                yield Path(root, name)


def _compact_paths(path: Path) -> Iterator[Path]:
    try:
        names = opened(path).names
    except RecordError:
        yield path
        return
    yield from (path / f"{name}.json" for name in names)


def read_file(path: Path) -> bytes:
    """Return the content of a record or items file.

    Raises:
        OSError: there is none, it cannot be read.
        RecordError: it is of a compact form that is damaged.
    """
    if (compact := _compact_of(path)) is None:
        if path.name == RECORDS:  # none of its records can be named
            opened(path)
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("no regular file")
        return path.read_bytes()
    records, (record, *file) = opened(compact), path.relative_to(compact).parts
    try:
        text = records.items_file(Path(record).stem, file[0]) if file else records.record(Path(record).stem)
    except KeyError:
        raise FileNotFoundError(f"no such file in {compact.name}") from None
    except (ValueError, TypeError, AttributeError, IndexError):
        raise RecordError(f"{path}: is not what was written") from None
    return text.encode()


def items_files(folder: Path) -> list[str] | None:
    """Return the names of the files of NAME.items, in order, and nothing of those in the making; None for no folder.

    Raises:
        RecordError: it is of a compact form that cannot be read.
    """
    if (compact := _compact_of(folder)) is not None:
        try:
            return opened(compact).items_files(folder.stem) or None
        except KeyError:
            return None
    if not folder.is_dir():
        return None
    return [path.name for path in (*sorted(folder.glob("[!.]*.jsonl")), *folder.glob(FILE))]


def read_items_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of NAME.items, by name; raises as `read_file`."""
    return {name: read_file(folder / name) for name in items_files(folder) or ()}


def is_compact(path: Path) -> bool:
    """Return whether a path leads into a compact form of records."""
    return _compact_of(path) is not None


def _compact_of(path: Path) -> Path | None:
    """Return the compact form that a path leads into, None for a file of its own."""
    return next((parent for parent in path.parents[:2] if parent.name == RECORDS), None)
