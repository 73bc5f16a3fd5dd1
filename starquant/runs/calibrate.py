"""The calibration of a run as an artifact: reused, waited for, or made; runs that differ in tasks only share it."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.masked_states import make_states
from starquant.calibration.overlap import dataset_overlap, item_overlap
from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.errors import RecordError
from starquant.methods.fitted import Fitted
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel
from starquant.models.block_causal import BlockCausalModel
from starquant.runs.inputs import Inputs, Loaded, Texts
from starquant.runs.timing import device_name
from starquant.session.session import Session
from starquant.session.threads import cpu_threads
from starquant.store import provenance
from starquant.store.artifacts import Artifact, ArtifactStore
from starquant.store.locks import exclusive

log = logging.getLogger(__name__)


def calibrate(inputs: Inputs, session: Session) -> tuple[Artifact, bool]:
    """Return the calibration of a run, on every process, and whether it was there already.

    Raises:
        StarquantError: states that cannot be made, a fit that fails, a folder that cannot be written; with
            stage=evaluate, a calibration that is not there.
    """
    return session.processes.by_first(_reuse_or_make, inputs, session)


def _reuse_or_make(inputs: Inputs, session: Session) -> tuple[Artifact, bool]:
    spec = inputs.spec
    store, digest = ArtifactStore(Path(spec.paths.results)), spec.calibration_digest()
    if artifact := reusable_artifact(spec, session):
        log.info("calibrated already: %s", store.path(digest))
        return artifact, True
    if spec.stage == "evaluate":
        raise RecordError(
            f"{store.path(digest)}: nothing of this code was calibrated for {spec.model.name} {spec.bits.name} "
            f"{spec.method.name}; run stage=calibrate first (or stage=all)"
        )
    with exclusive(store.lock(digest), f"the calibration of {spec.model.name} {spec.bits.name} {spec.method.name}"):
        if artifact := reusable_artifact(spec, session, alone=True):
            log.info("calibrated already: %s", store.path(digest))
            return artifact, True
        return _make(spec, inputs.load(session.device), store, session), False


def reusable_artifact(spec: RunSpec, session: Session, alone: bool = False) -> Artifact | None:
    """Return the calibration of a run that is there already, of this code or by `reuse`; None where it has to be made.

    Args:
        spec: pinned.
        session: whose code it is compared with.
        alone: whether the lock is held: what is not as it was written is set aside.

    Raises:
        RecordError: a calibration of a later version.
    """
    if spec.reuse == "never" and spec.stage != "evaluate":
        return None
    artifact = ArtifactStore(Path(spec.paths.results)).find(spec.calibration_digest(), alone)
    if artifact is None or (artifact.code_digest != session.code.fitting and spec.reuse != "any"):
        return None
    return artifact


def _make(spec: RunSpec, loaded: Loaded, store: ArtifactStore, session: Session) -> Artifact:
    digest, code, began = spec.calibration_digest(), session.code, time.perf_counter()
    work = store.unfinished(digest, code.fitting)
    if spec.reuse == "never":
        shutil.rmtree(work, ignore_errors=True)
    if work.exists():
        log.info("going on from an interrupted calibration: %s", work)
    with cpu_threads(spec.calibration.threads), blocks_of_trajectory(spec, loaded.model):
        states = calibration_states(spec, loaded, session)
        method = METHODS.build(spec.method)
        fitted = method.fit(loaded.model, spec.bits, states, Fitted.resume(work), session.progress)
    fitted.save(work)
    return store.finish(
        work,
        Artifact(
            digest=digest,
            identity=spec.calibration_identity(),
            code_digest=code.fitting,
            calibration=None if states is None else states.report,
            seconds={"calibrate": round(time.perf_counter() - began, 3)},
            provenance=provenance.collect(session.device, device_name(session.device), code),
        ),
    )


def blocks_of_trajectory(spec: RunSpec, model: MaskedDiffusionModel) -> AbstractContextManager[None]:
    """Let block diffusion's blocks be as long as those of the trajectories that it calibrates on, if it does."""
    if spec.calibration.states.sampler != "trajectory" or not isinstance(model, BlockCausalModel):
        return nullcontext()
    return model.blocks_of(family_of(model).make_sampler(spec.model.trajectory).own_block_length)


def calibration_states(spec: RunSpec, loaded: Loaded, session: Session) -> CalibrationStates | None:
    """Return what the method calibrates on, None when it needs nothing.

    Raises:
        StarquantError: states that cannot be made.
    """
    calibration, segments = spec.calibration, loaded.texts.calibration
    if calibration.source is None or segments is None:
        return None
    sampler = family_of(loaded.model).make_sampler(spec.model.trajectory)
    report = {"source": calibration.source.kind, "fingerprint": calibration.fingerprint}
    # Not at the run's batch size: what is fitted must not depend on it, not even by rounding.
    states = make_states(
        segments,
        calibration,
        loaded.model,
        sampler,
        report=report,
        progress=session.progress,
        bos=family_of(loaded.model).bos_token_id(loaded.tokenizer),
    )
    empty = states.report["empty_bins"]
    if empty:
        log.info("note: no calibration state has a mask ratio in bins %s of %d", empty, calibration.bins)
    return states


def read_fit(spec: RunSpec, artifact: Artifact, texts: Texts) -> tuple[Fitted, dict[str, Any] | None]:
    """Return what the method learned, and the report of the states that it learned from, None without any."""
    fitted = Fitted.load(ArtifactStore(Path(spec.paths.results)).path(artifact.digest))
    for what in dict.fromkeys(note["what"] for note in fitted.notes):
        where = [note["where"] for note in fitted.notes if note["what"] == what]
        log.info("note: %s (%s%s)", what, where[0], f" and {len(where) - 1} more" if len(where) > 1 else "")
    if artifact.calibration is None:
        return fitted, None
    return fitted, artifact.calibration | calibration_overlap(spec, texts)


def calibration_overlap(spec: RunSpec, texts: Texts) -> dict[str, Any]:
    """Return which tasks and how many fidelity prompts share text with the calibration data, and say so."""
    source, segments = spec.calibration.source, texts.calibration
    if source is None or segments is None:
        return {}
    held_out = [segment.text for segment in texts.fidelity or ()]
    shared_prompts = item_overlap([segment.text for segment in segments], held_out)
    if shared_prompts:
        log.warning("%d of %d fidelity prompts share text with the calibration data", shared_prompts, len(held_out))
    shared_tasks = dataset_overlap(source, spec.tasks.names)
    if shared_tasks:
        log.info(
            "note: calibration reads %s (%s), and %s of the same data set is scored; the record says so",
            *(source.kind, source.split, ", ".join(shared_tasks)),
        )
    return {"overlapping_tasks": shared_tasks, "overlapping_prompts": shared_prompts}
