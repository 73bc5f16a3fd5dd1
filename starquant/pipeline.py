"""One run, as plain calls: pin the inputs, load, fit, apply, evaluate, record. Knows every room; no room knows it."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from starquant.evaluation import offline
from starquant.evaluation.harness import evaluate
from starquant.evaluation.lm import DiffusionLM
from starquant.methods.fitted import Fitted
from starquant.models import load_model, load_tokenizer, resolve_folder
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import fingerprint
from starquant.models.loading import check_checkpoint, check_device, make_config
from starquant.preflight import check_paths
from starquant.records import provenance
from starquant.records.record import RunRecord, Timings
from starquant.records.store import RecordStore
from starquant.runtime import measure_operands
from starquant.spec import METHODS, RunSpec
from starquant.stages import (
    OverlapCounter,
    Texts,
    calibration_states,
    fidelity_reference,
    measure_fidelity,
    pin_sources,
    read_texts,
    tell_notes,
)
from starquant.testbed.shipped import weights_folder
from starquant.tracking import Tracker, make_tracker


@dataclass(frozen=True)
class Result:
    """A run's record, the full-precision record it is compared with, and where the record lies."""

    record: RunRecord
    baseline: RunRecord
    path: Path
    tracker: Tracker


@dataclass
class _Loaded:
    """The checkpoint in memory, read once for the full-precision and the quantized run."""

    folder: Path
    spec: RunSpec
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    seconds: float = 0.0
    model: MaskedDiffusionModel | None = field(default=None)

    @classmethod
    def prepare(cls, folder: Path, spec: RunSpec) -> _Loaded:
        """Read everything but the weights, so that bad text is found before anything is computed."""
        checkpoint, family = check_checkpoint(folder)
        tokenizer = load_tokenizer(folder)
        with torch.device("meta"):
            skeleton = family.model(make_config(checkpoint, family))
        METHODS.load(spec.method.name)(spec.method).check(skeleton, spec.bits)
        return cls(folder, spec, tokenizer, read_texts(spec, tokenizer, skeleton))

    def get(self) -> MaskedDiffusionModel:
        if self.model is None:
            began = time.perf_counter()
            self.model = load_model(self.folder, dtype=self.spec.model.dtype, device=self.spec.runtime.device)
            self.seconds = time.perf_counter() - began
        return self.model


def execute(spec: RunSpec, progress: bool = False) -> Result:
    """Run a specification to its record; what is on disk already is not computed again.

    Args:
        spec: what to run.
        progress: show progress bars.

    Raises:
        StarquantError: bad input, found before anything is written.
    """
    check_paths(spec)
    check_device(spec.runtime.device)
    if spec.runtime.threads is not None:
        torch.set_num_threads(spec.runtime.threads)
    spec, folder = pin(spec)
    store, tracker = RecordStore(Path(spec.paths.results)), make_tracker(spec)
    loaded = _Loaded.prepare(folder, spec)
    store.prepare()
    baseline = _record(spec.baseline(), store, loaded, tracker, progress)
    record = baseline if spec.is_baseline else _record(spec, store, loaded, tracker, progress)
    return Result(record, baseline, store.path(spec), tracker)


def pin(spec: RunSpec) -> tuple[RunSpec, Path]:
    """Put a specification into its one spelling and digests of its inputs' content into it.

    Returns it, and the checkpoint folder.

    Raises:
        StarquantError: checkpoint or data files are missing or malformed.
    """
    spec = spec.canonical()
    if spec.model.path is None:
        assert spec.model.seed is not None
        folder = weights_folder(spec.model.seed)
    else:
        folder = resolve_folder(spec.model.path, spec.model.revision)
    check_checkpoint(folder)
    model = spec.model.model_copy(update={"fingerprint": fingerprint(folder)})
    tasks = spec.tasks
    if tasks.data_dir is not None:
        data = offline.check_data(Path(tasks.data_dir), tasks.names)
        tasks = tasks.model_copy(update={"data_fingerprint": data})
    return pin_sources(spec.model_copy(update={"model": model, "tasks": tasks})), folder


def _record(spec: RunSpec, store: RecordStore, loaded: _Loaded, tracker: Tracker, progress: bool) -> RunRecord:
    found = None if spec.reuse == "never" else store.find(spec)
    if found is not None:
        same = found.provenance.get("code_digest") == provenance.code_digest()
        if same or spec.reuse == "any":
            _say(f"reused: {store.path(spec)} (reuse=never computes it again)")
            return found
        _say(f"computing again: {store.path(spec)} is of other code (reuse=any keeps it)")
    record, items = _run(spec, store, loaded, progress)
    tracker.publish(store.write(spec, record, items))
    shutil.rmtree(store.unfinished(spec.digest()), ignore_errors=True)
    return record


def _run(
    spec: RunSpec, store: RecordStore, loaded: _Loaded, progress: bool
) -> tuple[RunRecord, dict[str, list[dict[str, Any]]]]:
    _say(f"running: {store.name(spec)}")
    seconds: dict[str, float] = {}
    if spec.runtime.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(spec.runtime.device)
    model, tokenizer, texts = loaded.get(), loaded.tokenizer, loaded.texts
    seconds["load"] = loaded.seconds
    # What is finished is kept by code as well: that of other code is not mixed in.
    work = store.unfinished(spec.digest()) / provenance.code_digest()
    if work.exists():
        _say(f"going on from an interrupted run: {work}")
    with _timed(seconds, "reference"):
        reference = None if spec.is_baseline else fidelity_reference(spec, texts, model, progress)
    with _timed(seconds, "calibrate"):
        states = calibration_states(spec, texts, model, _say, progress)
        method = METHODS.load(spec.method.name)(spec.method)
        fitted = method.fit(model, spec.bits, states, Fitted.resume(work / "fitted"), progress)
        tell_notes(fitted.notes, _say)
    with _timed(seconds, "quantize"):
        manifest = method.apply(model, fitted, spec.bits, progress)
        manifest = measure_operands(model, manifest, spec.seed)
    overlap = OverlapCounter(states, _say)
    lm = DiffusionLM(model, tokenizer, batch_size=spec.runtime.batch_size, seed=spec.seed, progress=progress)
    with _timed(seconds, "evaluate"):
        done = evaluate(lm, spec.model, spec.tasks, work, spec.debug.verbose, overlap)
    scores, items = done.scores, done.items
    if reference is not None:
        with _timed(seconds, "fidelity"):
            fidelity = measure_fidelity(spec, model, reference, progress)
        scores, items = [*scores, *fidelity.scores], items | {"fidelity": fidelity.items}
    calibration = None
    if states is not None or fitted.notes:
        calibration = (states.report if states else {}) | {"overlap": overlap.found, "notes": fitted.notes}
    record = RunRecord(
        digest=spec.digest(),
        spec=spec.model_dump(mode="json"),
        status="complete",
        scores=scores,
        calibration=calibration,
        fit_report=fitted.report,
        manifest=manifest,
        timings=_timings(seconds, spec.runtime.device),
        provenance=provenance.collect(spec.runtime.device, _device_name(spec.runtime.device)),
    )
    return record, items


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def _timings(seconds: dict[str, float], device: str) -> Timings:
    scale = 1024 if sys.platform != "darwin" else 1  # ru_maxrss: KiB, bytes on macOS
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else None
    return Timings(
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        peak_host_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9,
        peak_device_memory_gb=peak,
    )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
