"""A run's quantized model as a packed checkpoint, or as a GGUF."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.llama_cpp.reading import exported_gguf
from starquant.methods.fitted import Fitted
from starquant.models.loading import validate_checkpoint
from starquant.packed.description import describe_part
from starquant.packed.export import export
from starquant.runs.calibrate import calibrate
from starquant.runs.gguf import validate_exported, write_export
from starquant.runs.inputs import Inputs
from starquant.runs.record import store_of
from starquant.session.session import Session
from starquant.session.threads import cpu_threads
from starquant.store.artifacts import Artifact, ArtifactStore
from starquant.store.exports import alone_at, exported_from, validate_listing, validate_shard_size, validate_target
from starquant.store.locks import exclusive, lock_path
from starquant.store.record import RunRecord

log = logging.getLogger(__name__)


def has_export(spec: RunSpec) -> bool:
    """Return whether what lies at `export.dir` says that it was exported with this run's record."""
    target = Path(spec.export.dir or "")
    record = exported_gguf(target) if spec.export.format == "gguf" else exported_from(target)
    return record == spec.digest()


def is_exported(spec: RunSpec) -> bool:
    """Return whether the model was exported with this run's record and options, whole.

    Raises:
        ConfigError: anything else is there, or a file that is not what was written.
        CheckpointError: what was exported is damaged.
    """
    target = Path(spec.export.dir or "")
    if spec.export.format == "gguf" and target.exists():
        validate_exported(spec)
        return True
    if spec.export.format == "packed" and has_export(spec):
        validate_checkpoint(target)
        validate_listing(target)
        validate_shard_size(target, spec.export.shard_size)
        return True
    validate_target(target)
    return False


def export_model(inputs: Inputs, record: RunRecord, artifact: Artifact | None, session: Session) -> float:
    """Quantize the checkpoint once more, this time to codes, and write it; returns the seconds it took.

    Args:
        inputs: whose model in memory is given up.
        record: of the run, for the model card.
        artifact: calibration of the run; None where this run has not needed it yet.
        session: where it happens.

    Raises:
        StarquantError: a target that cannot be written, a calibration that cannot be made.
    """
    began = time.perf_counter()
    if artifact is None and inputs.spec.quantizes:
        artifact, _ = calibrate(inputs, session)
    inputs.free()
    session.processes.by_first(_write, inputs, record, artifact, session)
    return time.perf_counter() - began


def _write(inputs: Inputs, record: RunRecord, artifact: Artifact | None, session: Session) -> None:
    """Write the model unless it is there; another process that writes it, or anything to that target, is waited for."""
    spec, target = inputs.spec, Path(inputs.spec.export.dir or "")
    lock = lock_path(Path(spec.paths.results), "export", spec.digest())
    with exclusive(lock, f"the export of {store_of(spec).name(spec)}"):
        if not is_exported(spec):
            with alone_at(target):
                if not is_exported(spec):  # by a run of another results folder
                    _write_alone(inputs, record, artifact, session)
                    return
        log.info("exported already: %s (remove it to export again)", target)


def _write_alone(inputs: Inputs, record: RunRecord, artifact: Artifact | None, session: Session) -> None:
    spec, target, results = inputs.spec, Path(inputs.spec.export.dir or ""), Path(inputs.spec.paths.results)
    parts = results / "unfinished" / f"export-{spec.digest()}" / session.code.fitting
    if spec.reuse == "never":
        shutil.rmtree(parts, ignore_errors=True)
    model = inputs.load(session.device, changed=parts).model
    if model.stored_blocks is not None and spec.export.format == "packed":  # a GGUF is planned from whole modules
        model.stored_blocks.describe = describe_part
        if parts.exists():
            log.info("going on from an interrupted export: %s", parts)
    fitted = Fitted() if artifact is None else Fitted.load(ArtifactStore(results).path(artifact.digest))
    with cpu_threads(spec.calibration.threads):
        METHODS.build(spec.method).apply(model, fitted, spec.bits, session.progress, packed=True)
    if spec.export.format == "gguf":
        size = write_export(spec, model, record, inputs.folder)
    else:
        size = export(model, record, inputs.folder, target, spec.export.shard_size)
    shutil.rmtree(parts.parent, ignore_errors=True)
    log.info("exported: %s, %s MB", target, f"{size / 1e6:,.1f}")
