"""The calibration of a run as an artifact: found, waited for, or made; runs that differ in tasks only share it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.errors import RecordError
from starquant.methods.fitted import Fitted
from starquant.runs.inputs import Loaded
from starquant.runs.stages import Say, calibration_states
from starquant.store import provenance
from starquant.store.artifacts import Artifact, ArtifactStore
from starquant.store.locks import exclusive


def ensure_calibrated(
    spec: RunSpec, store: ArtifactStore, load: Callable[[], Loaded], device_name: str, say: Say, progress: bool
) -> tuple[Artifact, bool]:
    """Return the calibration of a pinned run, and whether it was there already.

    Args:
        spec: pinned.
        store: of calibrations.
        load: gives what is read, when it has to be made.
        device_name: for its provenance.
        say: prints a line.
        progress: show progress bars.

    Raises:
        StarquantError: states that cannot be made, a fit that fails, a folder that cannot be written; with
            stage=evaluate, a calibration that is not there.
    """
    digest, code = spec.calibration_digest(), provenance.code_digest(provenance.FITTING)
    found = _usable(spec, store, digest, code, say, alone=False)
    if found is not None:
        return found, True
    if spec.stage == "evaluate":
        raise RecordError(
            f"{store.path(digest)}: nothing of this code was calibrated for {spec.model.name} {spec.bits.name} "
            f"{spec.method.name}; run stage=calibrate first (or stage=all)"
        )
    with exclusive(store.lock(digest), f"the calibration of {spec.model.name} {spec.bits.name} {spec.method.name}"):
        found = _usable(spec, store, digest, code, say, alone=True)
        if found is not None:
            return found, True
        return _make(spec, store, load(), device_name, say, progress), False


def _usable(spec: RunSpec, store: ArtifactStore, digest: str, code: str, say: Say, alone: bool) -> Artifact | None:
    found = None if spec.reuse == "never" and spec.stage != "evaluate" else store.find(digest, alone)
    if found is not None and (found.code_digest == code or spec.reuse == "any"):
        say(f"calibrated already: {store.path(digest)}")
        return found
    return None


def _make(spec: RunSpec, store: ArtifactStore, loaded: Loaded, device_name: str, say: Say, progress: bool) -> Artifact:
    digest, code = spec.calibration_digest(), provenance.code_digest(provenance.FITTING)
    work = store.unfinished(digest, code)
    if spec.reuse == "never":
        shutil.rmtree(work, ignore_errors=True)
    if work.exists():
        say(f"going on from an interrupted calibration: {work}")
    model, began = loaded.get(), time.perf_counter()
    states = calibration_states(spec, loaded.texts, model, say, progress)
    fitted = METHODS.build(spec.method).fit(model, spec.bits, states, Fitted.resume(work), progress)
    fitted.save(work)
    return store.finish(
        work,
        Artifact(
            digest=digest,
            identity=spec.calibration_identity(),
            code_digest=code,
            calibration=None if states is None else states.report,
            seconds={"calibrate": round(time.perf_counter() - began, 3)},
            provenance=provenance.collect(spec.runtime.device, device_name),
        ),
    )
