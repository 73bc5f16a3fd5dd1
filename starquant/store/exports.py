"""Where a packed checkpoint is written: what may be there already, and which record it is of."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from starquant.errors import ConfigError


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
