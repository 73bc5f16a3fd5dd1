"""Where a model is written: by one process at a time, what may be there already, and which record it is of."""

from __future__ import annotations

import glob
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from starquant.errors import ConfigError, RecordError
from starquant.store.files import FileEntry
from starquant.store.locks import wait_for

#: Sizes and digests of an export's other files.
LISTING = "starquant_files.json"


def validate_target(folder: Path) -> None:
    """Judge where a model is to be written; raises ConfigError when something is there already."""
    if not folder.name:
        raise ConfigError(f"export.dir: got '{folder}' (of no name), allowed: a new or empty folder")
    beside = next((parent for parent in folder.parents if parent.exists()), folder)
    if not beside.is_dir():
        raise ConfigError(f"export.dir: {folder}: cannot be written: {beside} is a file")
    try:
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise ConfigError(f"export.dir: {folder}: is there already; allowed: a new or empty folder")
        if folder.is_mount():
            raise ConfigError(f"export.dir: {folder}: is where a disk is mounted; allowed: a folder below it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent):
            pass
    except OSError as error:
        raise ConfigError(f"export.dir: {folder}: cannot be written: {error.strerror or error}") from error


@contextmanager
def alone_at(target: Path) -> Iterator[None]:
    """Hold a target against exports of other processes, of any results folder; inside it may be held again.

    The lock is a hidden file beside the target, which goes with it.

    Raises:
        ConfigError: it cannot be written.
    """
    path = target.parent.resolve() / f".{target.name}.export-lock"
    lock = FileLock(path, is_singleton=True)  # one for all who hold it here
    try:
        path.parent.stat()  # the lock would make the folder
        wait_for(lock, f"the export to {target}")
    except OSError as error:
        raise ConfigError(f"export.dir: {target}: cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):
                path.unlink()  # while it is held: who waits for it looks whether it is still there
        lock.release()


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """Yield a new folder beside a target, to write it in; what killed exports left there is removed.

    Raises:
        ConfigError: the target cannot be locked.
        OSError: no folder can be made beside it.
    """
    with alone_at(target):
        prefix = f".{target.name}.unfinished-"
        for left in target.parent.glob(f"{glob.escape(prefix)}*"):  # of no live export: it would hold the target
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def exported_from(folder: Path) -> str | None:
    """Return the digest of the record that a packed checkpoint was exported with; None where it is no such folder."""
    digest = _made_by(folder).get("record")
    return digest if isinstance(digest, str) else None


def validate_shard_size(folder: Path, size: str) -> None:
    """Compare what a packed checkpoint was cut into with what is wanted; one of earlier code, which is silent, passes.

    Raises:
        ConfigError: it was exported with another size.
    """
    written = _made_by(folder).get("shard_size", size)
    if written != size:
        raise exported_otherwise(folder, "shard_size", str(written), size)


def exported_otherwise(target: Path, key: str, written: str, wanted: str) -> ConfigError:
    """Return the error of an export that lies there, of this run but of another option."""
    return ConfigError(
        f"export.{key}: got {wanted}, but {target} was exported with export.{key}={written[:80]}; allowed: that one, "
        "or remove it, or name another"
    )


def _made_by(folder: Path) -> dict[str, Any]:
    """Return what a packed checkpoint says of its run; nothing where it is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        made_by = config["made_by"] if config["quant_method"] == "starquant" else None
        return made_by if isinstance(made_by, dict) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def write_listing(folder: Path) -> None:
    """Put down what an export holds, once it is whole; raises OSError where it cannot be written."""
    files = {path.name: FileEntry.of(path).model_dump() for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / LISTING).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def validate_listing(folder: Path) -> None:
    """Compare an export with what was written; one of earlier code, without a listing, passes.

    Raises:
        ConfigError: a file that is missing or not what was written.
    """
    path = folder / LISTING
    if not path.exists():
        return
    try:
        for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
            FileEntry.model_validate(entry).validate_file(folder / name)
    except (RecordError, OSError, ValueError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"export.dir: {first}; remove {folder} to export again") from None
