"""Finished calibrations on disk: one folder each, named by the digest of what was calibrated, whole or not there.

Layout: `artifacts/DIGEST/` holds fitted tensors and `artifact.json`, which lists every file with size and SHA-256 and
has a seal of its own. A folder is made under another name and renamed when it is complete; what does not match its
list, or its seal, is set aside.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from starquant.errors import NewerRecordError, RecordError
from starquant.store.files import FileEntry, set_aside, write_atomically
from starquant.store.locks import lock_path
from starquant.store.verification import is_intact, sealed

#: Version 1 had no seal.
SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
HEADER = "artifact.json"


class Artifact(BaseModel):
    """What a calibration says about itself.

    Attributes:
        digest: of what was calibrated: model, bits, method, calibration.
        identity: what the digest was taken of.
        code_digest: of the code that fitted it.
        calibration: report of the calibration states, None without any.
        seconds: by stage.
        provenance: as in a record.
        files: by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    digest: str
    identity: dict[str, Any]
    code_digest: str
    calibration: dict[str, Any] | None
    seconds: dict[str, float]
    provenance: dict[str, Any]
    files: dict[str, FileEntry] = {}


class ArtifactStore:
    """The calibrations below one results folder."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.folder = results / "artifacts"

    def path(self, digest: str) -> Path:
        """Return where a calibration is, or will be."""
        return self.folder / digest

    def lock(self, digest: str) -> Path:
        """Return the lock file of a calibration."""
        return lock_path(self.results, "artifact", digest)

    def unfinished(self, digest: str, code_digest: str) -> Path:
        """Return the folder where a calibration is made: that of other code is not gone on with."""
        return self.results / "unfinished" / f"artifact-{digest}" / code_digest

    def find(self, digest: str, alone: bool = True) -> Artifact | None:
        """Return a whole calibration, None when there is none; a damaged one is set aside.

        Args:
            digest: of the calibration.
            alone: whether the caller holds the lock; else what is not whole may be in the making, and is left alone.

        Raises:
            RecordError: a calibration of a later version, which is not this code's to move.
        """
        folder = self.path(digest)
        if not folder.exists():
            return None
        try:
            return self._validate(folder, digest)
        except NewerRecordError:
            raise
        except RecordError as error:
            if alone:
                set_aside(folder, str(error))
            return None

    def _validate(self, folder: Path, digest: str) -> Artifact:
        header = folder / HEADER
        try:
            data = json.loads(header.read_text(encoding="utf-8"))
            artifact = Artifact.model_validate({name: value for name, value in data.items() if name != "seal"})
            intact = artifact.schema_version < SCHEMA_VERSION or is_intact(data)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise RecordError(f"{header}: not readable as an artifact ({str(error).splitlines()[0]})") from None
        if artifact.schema_version not in READABLE_VERSIONS:
            kind = NewerRecordError if artifact.schema_version > SCHEMA_VERSION else RecordError
            allowed = " and ".join(map(str, READABLE_VERSIONS))
            raise kind(f"{header}: schema_version is {artifact.schema_version}, this version reads {allowed}")
        if artifact.digest != digest:
            raise RecordError(f"{header}: its digest is {artifact.digest}, its folder says {digest}")
        if not intact:
            raise RecordError(f"{header}: not what was written: its content is not that of its seal")
        for name in sorted(_files(folder) - artifact.files.keys()):
            raise RecordError(f"{folder / name}: is not of the calibration")
        for name, entry in artifact.files.items():
            entry.validate_file(folder / name)
        return artifact

    def finish(self, made: Path, artifact: Artifact) -> Artifact:
        """List the files of a folder in its header and move it into place, instead of one of other code.

        Raises:
            RecordError: the folder cannot be written.
        """
        target = self.path(artifact.digest)
        try:
            for left in made.glob(".*.part"):  # by processes that died while they wrote
                left.unlink()
            files = {name: FileEntry.of(made / name) for name in sorted(_files(made))}
            artifact = artifact.model_copy(update={"files": files})
            header = sealed(artifact.model_dump(mode="json"))
            write_atomically(made / HEADER, json.dumps(header, indent=1) + "\n")
            self.folder.mkdir(parents=True, exist_ok=True)
            replaced = target.with_name(f".{target.name}.old")
            shutil.rmtree(replaced, ignore_errors=True)  # of a process that died here
            if target.exists():
                target.rename(replaced)
            made.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            raise RecordError(f"{target}: cannot be written: {error}") from error
        shutil.rmtree(made.parent, ignore_errors=True)
        return artifact


def _files(folder: Path) -> set[str]:
    """Return the names of the files of a calibration beside its header."""
    return {path.name for path in folder.iterdir() if path.is_file()} - {HEADER}
