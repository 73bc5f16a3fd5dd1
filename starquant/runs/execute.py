"""One run, straight down: pin the inputs, load, calibrate, apply, evaluate, record. Knows every room.

validate paths -> pin inputs -> a record that is there already?
  -> load -> full precision's trajectories -> calibrate -> apply -> evaluate -> fidelity -> record -> tracker
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.errors import StarquantError
from starquant.methods.fitted import Fitted
from starquant.models.base import MaskedDiffusionModel
from starquant.models.loading import validate_device
from starquant.quantized.probe import measure_operands
from starquant.runs.calibrate import calibrate, read_fit
from starquant.runs.evaluate import OverlapCounter, evaluate_tasks, validate_tasks
from starquant.runs.export import export_model, is_exported
from starquant.runs.fidelity import fidelity_reference, measure_fidelity
from starquant.runs.gguf import description_of, predictor_of
from starquant.runs.inputs import Inputs, pin
from starquant.runs.inspect import inspect_activations
from starquant.runs.live import sqnr_by_block, stage
from starquant.runs.preflight import validate_paths
from starquant.runs.record import log_path, make_record, reusable_record, store_of, unfinished_answers, write_record
from starquant.runs.timing import timings
from starquant.session.devices import leased
from starquant.session.logs import FILE_ONLY, in_file
from starquant.session.session import Session
from starquant.session.threads import cpu_threads
from starquant.session.tracker import NullTracker, Tracker
from starquant.store import provenance
from starquant.store.artifacts import Artifact, ArtifactStore
from starquant.store.locks import exclusive
from starquant.store.manifest import ManifestEntry
from starquant.store.record import RunRecord
from starquant.tracking import make_tracker

Items = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        path: of its record; with stage=calibrate of the calibration, with stage=inspect of the report.
        record: of the run; None with these two stages.
        baseline: the full-precision record that it is compared with; None as well, and of a packed checkpoint.
        reused: whether all of it was there already.
        tracker: to be closed in the end.
        export_s: seconds that the export took; None without one.
    """

    path: Path
    record: RunRecord | None
    baseline: RunRecord | None
    reused: bool
    tracker: Tracker
    export_s: float | None = None


def execute(spec: RunSpec, session: Session | None = None) -> Result:
    """Run a specification to its record; what is on disk already is not computed again.

    Args:
        spec: what to run.
        session: of this process, for all its runs; None opens one for this run, without bars.

    Raises:
        StarquantError: bad input; `refused` says that nothing was computed.
    """
    session = Session.open() if session is None else session
    with _Refusals() as refusals, cpu_threads(spec.runtime.threads), leased(spec.runtime.device) as device:
        validate_paths(spec)
        session = _started(session, spec, session.processes.device(device))
        refusals.inputs = inputs = pin(spec)
        try:
            if spec.export.dir is not None:
                is_exported(inputs.spec)  # refused here, where anything else is there
            session.processes.by_first(store_of(spec).prepare)
            with in_file(log_path(inputs.spec) if session.processes.first else None), _heard(inputs.spec, session):
                result = _run_stage(inputs, session)
                session.processes.wait()  # the first one measures fidelity and writes while the others are done
                return result
        finally:
            inputs.free()


class _Refusals:
    """Marks errors of the user that come before weights are asked for: nothing was run."""

    inputs: Inputs | None = None

    def __enter__(self) -> _Refusals:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, StarquantError):
            error.refused = self.inputs is None or not self.inputs.began


def _started(session: Session, spec: RunSpec, device: str) -> Session:
    """Return the session with the run's device and tracker; the code is that of the session's first run."""
    if session.memory.code is None:
        session.memory.code = provenance.running_code()
    validate_device(device)
    tracker = make_tracker(spec) if type(session.tracker) is NullTracker else session.tracker
    hears = session.processes.first and type(tracker) is not NullTracker
    progress = replace(session.progress, hear=tracker.log if hears else None)
    return replace(session, device=device, tracker=tracker, progress=progress)


@contextlib.contextmanager
def _heard(spec: RunSpec, session: Session) -> Iterator[None]:
    """Put how the run begins and fails into its log, and tell the tracker of a failure."""
    session.log.debug("begins: %s, stage=%s, code %s, on %s", spec.digest(), spec.stage, session.code, session.device)
    for task, why in (spec.tasks.left_out or {}).items() if spec.is_scored else ():
        session.log.debug("%s is left out: it %s", task, why)  # the command line has told it, once for all cells
    if session.processes.world > 1:
        session.log.info("%d processes share the items of every task", session.processes.world)
    try:
        yield
    except (Exception, SystemExit) as error:  # a library may ask to exit
        session.log.error("failed: %s", error, exc_info=True, extra=FILE_ONLY)
        if session.processes.first:
            session.tracker.failed(spec, error)
            session.tracker.close()
        raise


def _run_stage(inputs: Inputs, session: Session) -> Result:
    if inputs.spec.stage == "calibrate":
        artifacts = ArtifactStore(Path(inputs.spec.paths.results))
        if not inputs.spec.quantizes:
            return Result(artifacts.folder, None, None, True, session.tracker)
        artifact, reused = calibrate(inputs, session)
        return Result(artifacts.path(artifact.digest), None, None, reused, session.tracker)
    if inputs.spec.stage == "inspect":
        path, reused = session.processes.by_first(inspect_activations, inputs, session)
        return Result(path, None, None, reused, session.tracker)
    return _score(inputs, session)


def _score(inputs: Inputs, session: Session) -> Result:
    """Return the record of a run beside that of full precision."""
    spec, artifact = inputs.spec, None
    if spec.stage == "evaluate" and spec.quantizes:
        artifact, _ = calibrate(inputs, session)  # refused here, before full precision is scored
    baseline = None if spec.is_packed else _record_of(spec.baseline(), inputs, None, session)
    scored = baseline if baseline is not None and spec.is_baseline else _record_of(spec, inputs, artifact, session)
    export_s = None
    if spec.export.dir is not None:
        export_s = export_model(inputs, scored.record, scored.artifact, session)
    reused = scored.reused and (baseline is None or baseline.reused)
    beside = None if baseline is None else baseline.record
    return Result(store_of(spec).path(spec), scored.record, beside, reused, session.tracker, export_s)


@dataclass(frozen=True)
class _Scored:
    """A record, whether it was there already, and the calibration, where it was needed."""

    record: RunRecord
    reused: bool
    artifact: Artifact | None


def _record_of(spec: RunSpec, inputs: Inputs, artifact: Artifact | None, session: Session) -> _Scored:
    """Return the record of a run or of its full-precision twin; of several processes at it one computes it."""
    together, store = session.processes, store_of(spec)
    record = together.by_first(reusable_record, spec, session)
    if record is not None:
        return _Scored(record, True, artifact)
    with contextlib.ExitStack() as alone:
        together.by_first(alone.enter_context, exclusive(store.lock(spec.digest()), store.name(spec)))
        record = together.by_first(reusable_record, spec, session, waited=True)
        if record is not None:
            return _Scored(record, True, artifact)
        validate_tasks(spec, session)
        inputs.validated()  # before anything is said to run
        session.log.info("running: %s", store.name(spec))
        if together.first:
            session.tracker.begin(spec)
        record, items, artifact = _compute(spec, inputs, artifact, session)
        if together.first:
            record = write_record(spec, record, items, session)
        return _Scored(record, False, artifact)


def _compute(
    spec: RunSpec, inputs: Inputs, artifact: Artifact | None, session: Session
) -> tuple[RunRecord, Items, Artifact | None]:
    """Load, calibrate, apply and evaluate what has been judged."""
    seconds: dict[str, float] = {}
    if session.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(session.device)
    loaded, answers = inputs.load(session.device), unfinished_answers(spec, session)
    seconds["load"] = loaded.seconds
    if answers.exists():
        session.log.info("going on from an interrupted run: %s", answers)
    with stage(seconds, "reference", session.progress):
        reference = fidelity_reference(spec, loaded, session)
    fitted, calibration = Fitted(), None
    if spec.quantizes:
        session.progress.tell({"stage": "calibrate"})
        artifact = artifact or calibrate(inputs, session)[0]
        seconds |= artifact.seconds
        fitted, calibration = read_fit(spec, artifact, loaded.texts)
    with stage(seconds, "quantize", session.progress):
        manifest = _apply(spec, loaded.model, fitted, session)
        predict = predictor_of(spec, loaded.model) if spec.is_gguf else None
    for figures in sqnr_by_block(manifest):
        session.progress.tell(figures)
    overlap = OverlapCounter(loaded.texts.calibration if calibration else None)
    with stage(seconds, "evaluate", session.progress):
        evaluation = evaluate_tasks(spec, loaded, answers, overlap, session, predict)
    seconds |= {f"evaluate/{task}": spent for task, spent in evaluation.seconds.items()}
    scores, items = evaluation.scores, evaluation.items
    if reference is not None:
        with stage(seconds, "fidelity", session.progress):
            fidelity = measure_fidelity(spec, loaded.model, reference, session, predict)
        scores, items = [*scores, *fidelity.scores], items | fidelity.by_group
    if calibration is not None or fitted.notes:
        calibration = (calibration or {}) | {"overlap": overlap.counts, "notes": fitted.notes}
    record = make_record(
        spec,
        session,
        scores=scores,
        calibration=calibration,
        fit_report=fitted.report,
        manifest=manifest,
        timings=timings(seconds, session.device),
    )
    return record, items, artifact


def _apply(spec: RunSpec, model: MaskedDiffusionModel, fitted: Fitted, session: Session) -> list[ManifestEntry]:
    """Quantize the model in place and return what became of every linear and operand."""
    if spec.is_gguf:
        return description_of(spec).manifest()
    with cpu_threads(spec.calibration.threads):
        manifest = METHODS.build(spec.method).apply(model, fitted, spec.bits, session.progress)
    return measure_operands(model, manifest, spec.seed)
