"""One run, as plain calls: pin the inputs, load, calibrate, apply, evaluate, record. Knows every room."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from starquant.config.digest import digest_of
from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.methods.fitted import Fitted
from starquant.models.cuda_graphs import compiled_blocks
from starquant.models.loading import validate_checkpoint, validate_device
from starquant.packed.export import export
from starquant.quantized.probe import measure_operands
from starquant.runs.calibrate import ensure_calibrated
from starquant.runs.inputs import Loaded, pin
from starquant.runs.inspect import inspect_activations
from starquant.runs.preflight import check_paths
from starquant.runs.stages import (
    OverlapCounter,
    calibration_overlap,
    fidelity_reference,
    measure_fidelity,
    tell_notes,
)
from starquant.runs.timing import device_name, timed, timings
from starquant.session.devices import leased
from starquant.session.processes import Processes, processes
from starquant.store import provenance
from starquant.store.artifacts import Artifact, ArtifactStore
from starquant.store.exports import exported_from, validate_target
from starquant.store.locks import exclusive
from starquant.store.record import RunRecord
from starquant.store.records import RecordStore
from starquant.tracking import Tracker, make_tracker

if TYPE_CHECKING:
    from starquant.evaluation.reference import Reference

#: Records that this process has computed: with reuse=never a sweep still computes full precision once.
_MADE_HERE: set[Path] = set()


#: The last fidelity reference, and how large one may be to be kept.
_REFERENCES: dict[str, Reference] = {}
KEPT_BYTES = 2**28


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        path: of its record; with stage=calibrate of the calibration, with stage=inspect of the report.
        record: of the run; None with these two stages.
        baseline: the full-precision record that it is compared with; None as well, and of a packed checkpoint.
        reused: whether all of it was there already.
        tracker: to be closed in the end.
    """

    path: Path
    record: RunRecord | None
    baseline: RunRecord | None
    reused: bool
    tracker: Tracker


def execute(spec: RunSpec, progress: bool = False) -> Result:
    """Run a specification to its record; what is on disk already is not computed again.

    Args:
        spec: what to run.
        progress: show progress bars.

    Raises:
        StarquantError: bad input, found before anything is written.
    """
    check_paths(spec)
    with leased(spec.runtime.device) as device:
        provenance.source()  # as the run starts: what is committed meanwhile is not what ran
        together = processes()
        validate_device(device := together.device(device))
        if spec.runtime.threads is not None:
            torch.set_num_threads(spec.runtime.threads)
        run = _Run(spec, device, together, progress and together.first)
        try:
            if spec.export.dir is not None:
                run.exported()
            result = run.stages()
            if spec.export.dir is not None:
                run.export(result)
            together.wait()  # the first one measures fidelity and writes while the others are done
            return result
        finally:
            run.free()


class _Run:
    """One run under way."""

    def __init__(self, spec: RunSpec, device: str, together: Processes, progress: bool) -> None:
        self.spec, self.folder = pin(spec)
        self.device, self.together, self.progress = device, together, progress
        self.store, self.artifacts = (kind(Path(spec.paths.results)) for kind in (RecordStore, ArtifactStore))
        self.tracker, self.computed = make_tracker(spec), False
        self.calibration: tuple[Artifact, bool] | None = None

    @functools.cached_property
    def loaded(self) -> Loaded:
        """All that is read, judged as soon as anything has to be computed."""
        found = Loaded.prepare(self.folder, self.spec, self.device)
        if found.packed:
            self.say(f"note: {self.folder} is packed: scored as it is, without full precision and fidelity beside it")
        return found

    def stages(self) -> Result:
        self.together.by_first(self.store.prepare)
        if self.together.world > 1:
            self.say(f"{self.together.world} processes share the items of every task")
        if self.spec.stage == "evaluate" and self.spec.quantizes:
            self._calibrated()  # refused here, before full precision is scored
        if self.spec.stage == "calibrate":
            if not self.spec.quantizes:
                return Result(self.artifacts.folder, None, None, True, self.tracker)
            _, reused = self._calibrated()
            return Result(self.artifacts.path(self.spec.calibration_digest()), None, None, reused, self.tracker)
        if self.spec.stage == "inspect":
            name = device_name(self.device)
            path, reused = self.together.by_first(
                lambda: inspect_activations(
                    self.spec, self.store.results, lambda: self.loaded, name, self.say, self.progress
                )
            )
            return Result(path, None, None, reused, self.tracker)
        baseline = None if self.spec.is_packed else self._record(self.spec.baseline())
        record = baseline if self.spec.is_baseline else self._record(self.spec)
        return Result(self.store.path(self.spec), record, baseline, not self.computed, self.tracker)

    def exported(self) -> bool:
        """Whether the model was exported with this run's record; raises ConfigError where anything else was."""
        target = Path(self.spec.export.dir or "")
        if exported_from(target) == self.spec.digest():
            validate_checkpoint(target)  # and it is whole
            return True
        validate_target(target)
        return False

    def export(self, result: Result) -> None:
        """Quantize the checkpoint once more, this time to codes, and write it."""
        record, asked = result.record, self.spec.export
        assert record is not None and asked.dir is not None
        target, (artifact, _) = Path(asked.dir), self._calibrated()
        self.free()

        def write() -> str:
            if self.exported():
                return f"exported already: {target} (remove it to export again)"
            model, fitted = self.loaded.get(), Fitted.load(self.artifacts.path(artifact.digest))
            method = METHODS.build(self.spec.method)
            method.apply(model, fitted, self.spec.bits, self.progress, packed=True)
            size = export(model, record, self.folder, target, asked.shard_size)
            return f"exported: {target}, {size / 1e6:,.1f} MB"

        self.say(self.together.by_first(write))

    def free(self) -> None:
        """Give the model's memory back, for the next job of this process."""
        self.__dict__.pop("loaded", None)
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def say(self, line: str) -> None:
        if self.together.first:
            print(line, file=sys.stderr, flush=True)

    def _calibrated(self) -> tuple[Artifact, bool]:
        """Return the run's calibration, and whether it was there already."""
        if self.calibration is None:
            name, load = device_name(self.device), lambda: self.loaded
            self.calibration = self.together.by_first(
                lambda: ensure_calibrated(self.spec, self.artifacts, load, name, self.say, self.progress)
            )
        return self.calibration

    def _record(self, spec: RunSpec) -> RunRecord:
        found: RunRecord | None = self.together.by_first(lambda: self._reusable(spec))
        if found is not None:
            return found
        name = self.store.name(spec)
        with contextlib.ExitStack() as alone:
            lock = exclusive(self.store.lock(spec.digest()), name)
            self.together.by_first(lambda: alone.enter_context(lock))
            found = self.together.by_first(lambda: self._reusable(spec, waited=True))  # another process has made it
            if found is not None:
                return found
            self.computed = True
            record, items = self._compute(spec)
            if self.together.first:
                path = self.store.write(spec, record, items)
                _MADE_HERE.add(path)
                self.tracker.publish(path)
                shutil.rmtree(self.store.unfinished(spec.digest()), ignore_errors=True)
            return record

    def _reusable(self, spec: RunSpec, waited: bool = False) -> RunRecord | None:
        path = self.store.path(spec)
        found = None if spec.reuse == "never" and path not in _MADE_HERE else self.store.find(spec)
        if found is None:
            return None
        if found.provenance.get("code_digest") == provenance.code_digest() or spec.reuse == "any":
            self.say(f"reused: {path} (reuse=never computes it again)")
            self.tracker.publish(path)  # it may have been away when the record was made
            return found
        if not waited:
            self.say(f"computing again: {path} is of other code (reuse=any keeps it)")
        return None

    def _compute(self, spec: RunSpec) -> tuple[RunRecord, dict[str, list[dict[str, Any]]]]:
        from starquant.evaluation.harness import evaluate  # seconds of imports that a finished cell does not need
        from starquant.evaluation.lm import DiffusionLM

        self.say(f"running: {self.store.name(spec)}")
        seconds: dict[str, float] = {}
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        model, loaded = self.loaded.get(), self.loaded
        seconds["load"] = loaded.seconds
        # What is finished is kept by code as well: that of other code is not mixed in.
        work = self.store.unfinished(spec.digest()) / provenance.code_digest()
        if work.exists():
            self.say(f"going on from an interrupted run: {work}")
        with timed(seconds, "reference"):
            follows = spec.quantizes and self.together.first
            reference = self._reference(spec) if follows else None
        fitted, calibration = Fitted(), None
        if spec.quantizes:
            fitted, calibration = self._fitted(spec, seconds)
        with timed(seconds, "quantize"):
            manifest = METHODS.build(spec.method).apply(model, fitted, spec.bits, self.progress)
            manifest = measure_operands(model, manifest, spec.seed)
        overlap = OverlapCounter(loaded.texts.calibration if calibration else None, self.say)
        lm = DiffusionLM(
            model,
            loaded.tokenizer,
            batch_size=spec.runtime.batch_size,
            seed=spec.seed,
            speed=spec.speed,
            progress=self.progress,
            together=self.together,
        )
        with timed(seconds, "evaluate"), compiled_blocks(model, spec.speed.compile):
            done = evaluate(lm, spec.model, spec.tasks, work, spec.debug.verbose, overlap)
        scores, items = done.scores, done.items
        if reference is not None:
            with timed(seconds, "fidelity"):
                fidelity = measure_fidelity(spec, model, reference, self.progress)
            scores, items = [*scores, *fidelity.scores], items | {"fidelity": fidelity.items}
        if calibration is not None or fitted.notes:
            calibration = (calibration or {}) | {"overlap": overlap.found, "notes": fitted.notes}
        record = RunRecord(
            digest=spec.digest(),
            spec=spec.model_dump(mode="json"),
            status="complete",
            scores=scores,
            calibration=calibration,
            fit_report=fitted.report,
            manifest=manifest,
            timings=timings(seconds, self.device),
            provenance=provenance.collect(self.device, device_name(self.device)),
        )
        return record, items

    def _reference(self, spec: RunSpec) -> Reference | None:
        """Return full precision's trajectories; a small one is kept for the next cell of this process."""
        whole = spec.identity()
        key = digest_of({name: whole[name] for name in ("model", "fidelity", "seed")} | {"device": self.device})
        key += f"-{spec.tasks.limit}-{spec.runtime.batch_size}-{provenance.code_digest()}"
        if key not in _REFERENCES:
            _REFERENCES.clear()
            found = fidelity_reference(spec, self.loaded.texts, self.loaded.get(), self.progress)
            if found is None or found.nbytes > KEPT_BYTES:
                return found
            _REFERENCES[key] = found
        return _REFERENCES[key]

    def _fitted(self, spec: RunSpec, seconds: dict[str, float]) -> tuple[Fitted, dict[str, Any] | None]:
        """Return what the method learned, and the report of the states it learned from."""
        artifact, _ = self._calibrated()
        seconds |= artifact.seconds
        fitted = Fitted.load(self.artifacts.path(artifact.digest))
        tell_notes(fitted.notes, self.say)
        if artifact.calibration is None:
            return fitted, None
        return fitted, artifact.calibration | calibration_overlap(spec, self.loaded.texts, self.say)
