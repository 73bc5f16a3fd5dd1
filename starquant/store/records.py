"""Records on disk: one JSON file a run, written atomically, found by digest."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from starquant.config.run import RunSpec
from starquant.errors import ConfigError, NewerRecordError, RecordError
from starquant.store.columns import FILE as COLUMNS
from starquant.store.columns import write_columns
from starquant.store.files import set_aside, write_atomically
from starquant.store.items import items_folder
from starquant.store.locks import lock_path
from starquant.store.record import READABLE_VERSIONS, RecordHead, RunRecord
from starquant.store.source import read_file, read_items_files
from starquant.store.verification import mend_columns, sealed, validate_content, validate_items

RecordT = TypeVar("RecordT", bound=RecordHead)


class RecordStore:
    """The records below one results folder.

    Layout: `records/NAME.json`, `records/NAME.items/TASK.jsonl` beside it (and the numbers of all tasks in
    `columns.json`), `unfinished/DIGEST/` for answers of runs that have not ended. NAME is
    model-bits-method-tasks-digest.
    """

    def __init__(self, results: Path) -> None:
        self.results = results
        self.folder = results / "records"

    @staticmethod
    def name(spec: RunSpec) -> str:
        """Return the file stem of a run's record."""
        return f"{spec.model.name}-{spec.bits.name}-{spec.method.name}-{spec.tasks.name}-{spec.digest()}"

    def unfinished(self, digest: str) -> Path:
        """Return the folder for answers of a run that has not ended."""
        return self.results / "unfinished" / digest

    def lock(self, digest: str) -> Path:
        """Return the lock file of a run."""
        return lock_path(self.results, "record", digest)

    def prepare(self) -> None:
        """Make the folders, so that a run which cannot be recorded does not start.

        Raises:
            RecordError: the results folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise RecordError(f"paths.results: {self.results}: cannot be written: {error.strerror}") from error

    def path(self, spec: RunSpec) -> Path:
        """Return where a run's record is, or will be."""
        return self.folder / f"{self.name(spec)}.json"

    def find(self, spec: RunSpec, alone: bool = True) -> RunRecord | None:
        """Return the record of a run, None when there is none; one that is not what was written is set aside.

        Of one whose items are whole, kept numbers that are damaged are set aside alone, and made again.

        Args:
            spec: of the run.
            alone: whether the caller holds the lock; else what is not whole may be in the making, and is left alone.

        Raises:
            RecordError: a record of a later version, which is not this code's to move.
        """
        path = self.path(spec)
        if not path.exists():
            return None
        try:
            record = read_record(path)
            if record.digest != spec.digest():
                raise RecordError(f"{path}: its digest is {record.digest}, its name says {spec.digest()}")
            if alone:
                mend_columns(path, record)
            validate_items(path, record, whole=True)
        except NewerRecordError:
            raise
        except RecordError as error:
            if alone:
                set_aside(path, str(error), beside=items_folder(path))
            return None
        return record

    def write(
        self, spec: RunSpec, record: RunRecord, items: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
    ) -> Path:
        """Write a record and its per-item logs; the record appears last and whole, or not at all.

        Raises:
            RecordError: the folder cannot be written.
        """
        path = self.path(spec)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_items(items_folder(path), items or {})
            data = sealed(record.model_dump(mode="json"), read_items_files(items_folder(path)))
            write_atomically(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise RecordError(f"{path}: cannot be written: {error}") from error
        return path

    @staticmethod
    def _write_items(folder: Path, items: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        for left in (*folder.glob("*.jsonl"), *folder.glob(COLUMNS)):  # of a record that this one replaces
            if left.stem not in items:
                left.unlink()
        for task, rows in items.items():
            lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            write_atomically(folder / f"{task}.jsonl", lines)
        if items:
            write_columns(folder, items)


class _Version(BaseModel):
    schema_version: Any = None


def read_record(path: Path) -> RunRecord:
    """Read a record; raises RecordError naming the file when it is not what was written, or of another schema."""
    return _read(path, RunRecord)


def twin_of(path: Path) -> Path | None:
    """Return the full-precision record beside a run's; None where there is none, or it is the run's own.

    Raises:
        RecordError: the run's record is not what was written.
    """
    try:
        name = RecordStore.name(RunSpec.from_config(read_head(path).spec).baseline())
    except ConfigError:  # of another version of this code
        return None
    twin = path.with_name(f"{name}.json")
    return twin if twin != path and twin.exists() else None


def read_head(path: Path) -> RecordHead:
    """Read what tables need of a record; raises as `read_record`."""
    return _read(path, RecordHead)


def _read(path: Path, kind: type[RecordT]) -> RecordT:
    try:
        text = read_file(path)
    except OSError as error:
        raise RecordError(f"{path}: not readable as a record ({error})") from None
    try:
        record = kind.model_validate_json(text)
    except ValidationError as error:
        _validate_version(path, text)
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise RecordError(f"{path}: {where}: {problem['msg']}") from None
    if record.schema_version not in READABLE_VERSIONS:
        _validate_version(path, text)
    validate_content(path, record, text)
    return record


def _validate_version(path: Path, text: bytes) -> None:
    try:
        version = _Version.model_validate_json(text).schema_version
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise RecordError(f"{path}: not readable as a record ({why})") from None
    if version not in READABLE_VERSIONS:
        allowed = " and ".join(map(str, READABLE_VERSIONS))
        kind = NewerRecordError if isinstance(version, int) and version > max(READABLE_VERSIONS) else RecordError
        raise kind(f"{path}: schema_version is {version!r}, this version reads {allowed}")
