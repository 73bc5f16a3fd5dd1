"""The record of a run: reused where it is there already, else written; and the log beside it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starquant.config.run import RunSpec
from starquant.config.tasks import EXECUTES_CODE
from starquant.errors import StarquantError
from starquant.runs.evaluate import documents_of, suite_key
from starquant.runs.timing import device_name
from starquant.session.session import Session
from starquant.store import provenance
from starquant.store.record import RunRecord
from starquant.store.records import RecordStore, read_record

log = logging.getLogger(__name__)


def store_of(spec: RunSpec) -> RecordStore:
    """Return where a run's record is kept."""
    return RecordStore(Path(spec.paths.results))


def log_path(spec: RunSpec) -> Path:
    """Return the log of a pinned run: NAME.log beside the NAME.json it writes, in `logs/` where it writes no record."""
    if not spec.is_scored:
        name = f"{spec.stage}-{spec.model.name}-{spec.bits.name}-{spec.method.name}-{spec.calibration_digest()}.log"
        return Path(spec.paths.results) / "logs" / name
    return store_of(spec).path(spec).with_suffix(".log")


def unfinished_answers(spec: RunSpec, session: Session) -> Path:
    """Return where single answers are kept until the record is there; those of other code are not mixed in."""
    return store_of(spec).unfinished(spec.digest()) / session.code.scoring


def kept_record(spec: RunSpec, session: Session, alone: bool = False) -> RunRecord | None:
    """Return the record of a run that is on disk; None for none, and where `reuse=never` leaves it out.

    Args:
        spec: pinned.
        session: whose own records are reused even with reuse=never.
        alone: whether the lock is held: what is not as it was written is set aside.

    Raises:
        RecordError: a record of a later version.
    """
    if spec.reuse == "never" and store_of(spec).path(spec) not in session.memory.records:
        return None
    return store_of(spec).find(spec, alone)


def is_current(spec: RunSpec, record: RunRecord, session: Session) -> bool:
    """Return whether a record is of this code and sealed, or kept whatever it is of (`reuse=any`)."""
    return spec.reuse == "any" or (_is_of_this_code(record, session) and record.seal is not None)


def _is_of_this_code(record: RunRecord, session: Session) -> bool:
    return bool(record.provenance.get("code_digest") == session.code.scoring)


def reusable_record(spec: RunSpec, session: Session, waited: bool = False) -> RunRecord | None:
    """Return the record of a run that is there already, None where it has to be computed.

    Args:
        spec: pinned.
        session: whose own records are reused even with reuse=never.
        waited: for another process, which may have made it; why it is not reused has been said. The lock is held:
            what is not as it was written is set aside.

    Raises:
        RecordError: a record of a later version.
    """
    path, record = store_of(spec).path(spec), kept_record(spec, session, alone=waited)
    if record is None:
        return None
    other = _other_items(spec, record, session)
    if other and spec.reuse != "any":
        if not waited:
            log.info("computing again: %s is of other items of %s (reuse=any keeps it)", path, ", ".join(other))
        return None
    if is_current(spec, record, session):
        if record.seal is None:
            log.info("note: %s was written without a seal: whether it was changed since cannot be told", path)
        log.info("reused: %s (reuse=never computes it again)", path)
        session.tracker.publish(path)  # it may have been away when the record was made
        return record
    if not waited:
        why = "was written without a seal" if _is_of_this_code(record, session) else "is of other code"
        log.info("computing again: %s %s (reuse=any keeps it)", path, why)
    return None


def _other_items(spec: RunSpec, record: RunRecord, session: Session) -> list[str]:
    """Return the tasks of a record whose items, read through the hub, are not those that are read here."""
    before = record.provenance.get("documents")
    if not before:
        return []
    try:
        documents = documents_of(spec, session)
    except StarquantError as error:
        log.info("note: whether the items of %s are the same cannot be told (%s)", store_of(spec).name(spec), error)
        return []
    return [leaf for leaf in documents if documents[leaf] != before.get(leaf)]


def make_record(spec: RunSpec, session: Session, **parts: Any) -> RunRecord:
    """Return the record of a run that is complete: what `parts` names, the specification, and where it comes from."""
    origin = provenance.collect(session.device, device_name(session.device), session.code)
    if any(name in EXECUTES_CODE for name in spec.tasks.names):
        from starquant.evaluation.sandbox.protection import protection

        origin["sandbox"] = protection().as_data()
    if documents := session.memory.tasks.get(suite_key(spec)):  # read when they were judged
        origin["documents"] = documents
    return RunRecord(
        digest=spec.digest(),
        spec=spec.model_dump(mode="json"),
        status="complete",
        provenance=origin,
        **parts,
    )


def write_record(
    spec: RunSpec, record: RunRecord, items: Mapping[str, Sequence[Mapping[str, Any]]], session: Session
) -> RunRecord:
    """Write a record with its items, tell the tracker, drop the single answers, and return the record with its seal.

    Raises:
        RecordError: the folder cannot be written.
    """
    path = store_of(spec).write(spec, record, items)
    log.debug("wrote: %s", path)
    session.memory.records.add(path)
    session.tracker.publish(path)
    shutil.rmtree(store_of(spec).unfinished(spec.digest()), ignore_errors=True)
    return read_record(path)
