"""Where a packed checkpoint is written: what may be there already, and which record it is of."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from starquant.errors import ConfigError, RecordError
from starquant.store.files import FileEntry

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


def exported_from(folder: Path) -> str | None:
    """Return the digest of the record that a packed checkpoint was exported with; None where it is no such folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        digest = config["made_by"]["record"] if config["quant_method"] == "starquant" else None
        return digest if isinstance(digest, str) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


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
