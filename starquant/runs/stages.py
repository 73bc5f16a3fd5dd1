"""What a run does with data before and beside scoring: calibration states, the fidelity reference, overlap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from starquant.calibration import segments as sources
from starquant.calibration.batches import CalibrationStates, Segment
from starquant.calibration.masked_states import make_states
from starquant.calibration.overlap import dataset_overlap, item_overlap
from starquant.config.calibration import SourceSpec
from starquant.config.run import RunSpec
from starquant.diffusion import BatchSize
from starquant.errors import ConfigError
from starquant.evaluation.fidelity import Fidelity, Reference, measure, take_reference
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel

Say = Callable[[str], None]


def pin_sources(spec: RunSpec) -> RunSpec:
    """Put digests of calibration and fidelity text into the specification.

    Raises:
        StarquantError: text that is missing or malformed.
    """
    changes: dict[str, Any] = {}
    for name, part in (("calibration", spec.calibration), ("fidelity", spec.fidelity)):
        if part.source is not None:
            found = sources.fingerprint(part.source, spec.tasks.data_dir, f"{name}.source")
            changes[name] = part.model_copy(update={"fingerprint": found})
    return spec.model_copy(update=changes)


@dataclass(frozen=True)
class Texts:
    """The segments of a run, read before anything is computed; None where it needs none."""

    calibration: list[Segment] | None
    fidelity: list[Segment] | None


def read_texts(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, model: MaskedDiffusionModel) -> Texts:
    """Read what a run calibrates on and is compared on, and judge it by the model (which may be on the meta device).

    Raises:
        StarquantError: text that cannot be used, a segment longer than the context, a trajectory that does not fit.
    """
    family = family_of(model)
    bos = family.bos_token_id(tokenizer)
    context_length = model.config.context_length
    states = spec.calibration.states
    if spec.fidelity.source is not None or (spec.calibration.source is not None and states.sampler == "trajectory"):
        sampler = family.make_sampler(spec.model.trajectory)
        sources.prompts_of([], sampler.answer_length, context_length)
        if states.sampler == "trajectory" and states.per_segment > sampler.steps:
            raise ConfigError(
                f"calibration.states.per_segment: got {states.per_segment}, allowed: at most the trajectory's "
                f"{sampler.steps} steps"
            )

    def read(source: SourceSpec | None, seed: int, where: str) -> list[Segment] | None:
        if source is None:
            return None
        data_dir = spec.tasks.data_dir
        found = sources.read_segments(source, tokenizer, context_length, seed=seed, data_dir=data_dir, where=where)
        return found if bos is None else [_begin(segment, bos, context_length) for segment in found]

    return Texts(
        read(spec.calibration.source, spec.calibration.seed, "calibration.source"),
        # Seed 0: the same prompts whatever the run's seed, since methods are compared on them.
        read(spec.fidelity.source, 0, "fidelity.source"),
    )


def _begin(segment: Segment, bos: int, limit: int) -> Segment:
    """Put BOS in front of a prompt, as the family's evaluation does (Dream)."""
    if not segment.prompt_length:
        return segment
    return replace(segment, ids=(bos, *segment.ids)[:limit], prompt_length=segment.prompt_length + 1)


def calibration_overlap(spec: RunSpec, texts: Texts, say: Say) -> dict[str, Any]:
    """Return which tasks and how many fidelity prompts share text with the calibration data, and say so."""
    asked, segments = spec.calibration, texts.calibration
    if asked.source is None or segments is None:
        return {}
    held_out = [segment.text for segment in texts.fidelity or ()]
    seen = item_overlap([segment.text for segment in segments], held_out)
    if seen:
        say(f"warning: {seen} of {len(held_out)} fidelity prompts share text with the calibration data")
    shared = dataset_overlap(asked.source, spec.tasks.names)
    if shared:
        say(
            f"note: calibration reads {asked.source.kind} ({asked.source.split}), and "
            f"{', '.join(shared)} of the same data set is scored; the record says so"
        )
    return {"overlapping_tasks": shared, "overlapping_prompts": seen}


def calibration_states(
    spec: RunSpec, texts: Texts, model: MaskedDiffusionModel, say: Say, progress: bool
) -> CalibrationStates | None:
    """Return what the method calibrates on, None when it needs nothing.

    Raises:
        StarquantError: states that cannot be made.
    """
    asked, segments = spec.calibration, texts.calibration
    if asked.source is None or segments is None:
        return None
    sampler = family_of(model).make_sampler(spec.model.trajectory)
    report = {"source": asked.source.kind, "fingerprint": asked.fingerprint}
    # Not at the run's batch size: what is fitted must not depend on it, not even by rounding.
    states = make_states(segments, asked, model, sampler, report=report, progress=progress)
    if states.report["empty_bins"]:
        say(f"note: no calibration state has a mask ratio in bins {states.report['empty_bins']} of {asked.bins}")
    return states


def fidelity_reference(spec: RunSpec, texts: Texts, model: MaskedDiffusionModel, progress: bool) -> Reference | None:
    """Return full precision's held-out trajectories, None when fidelity is not measured.

    Raises:
        StarquantError: an answer that does not fit the context.
    """
    if texts.fidelity is None:
        return None
    sampler = family_of(model).make_sampler(spec.model.trajectory)
    # A limit is items a task: fidelity's prompts are held to it too.
    prompts = sources.prompts_of(texts.fidelity[: spec.tasks.limit], sampler.answer_length, model.config.context_length)
    return take_reference(
        model,
        prompts,
        sampler,
        batch_size=BatchSize.of(spec.runtime.batch_size, model),
        seed=spec.seed,
        max_positions=spec.fidelity.positions,
        progress=progress,
    )


def measure_fidelity(spec: RunSpec, model: MaskedDiffusionModel, reference: Reference, progress: bool) -> Fidelity:
    """Compare the quantized model with the reference."""
    asked = spec.fidelity
    return measure(
        model,
        reference,
        bins=asked.bins,
        resamples=asked.resamples,
        seed=spec.seed,
        batch_size=BatchSize.of(spec.runtime.batch_size, model),
        progress=progress,
    )


def tell_notes(notes: list[dict[str, Any]], say: Say) -> None:
    """Say in one line each which kinds of fallback a fit took; the record lists them."""
    for what in dict.fromkeys(note["what"] for note in notes):
        where = [note["where"] for note in notes if note["what"] == what]
        say(f"note: {what} ({where[0]}" + (f" and {len(where) - 1} more)" if len(where) > 1 else ")"))


class OverlapCounter:
    """Counts evaluation items whose text stands in the calibration text, task by task."""

    def __init__(self, segments: list[Segment] | None, say: Say) -> None:
        self._texts = [segment.text for segment in segments or ()]
        self._say = say
        self.found: dict[str, int] = {}

    def __call__(self, task: str, documents: list[str]) -> None:
        """Look at the documents of one task."""
        count = item_overlap(self._texts, documents) if self._texts else 0
        if count:
            self.found[task] = count
            self._say(f"warning: {count} of {len(documents)} items of {task} share text with the calibration data")
