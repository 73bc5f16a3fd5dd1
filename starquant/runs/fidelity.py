"""Fidelity within a run: full precision's states before the model is quantized, the comparison after."""

from __future__ import annotations

from typing import Any

from starquant.calibration.segments import prompts_of
from starquant.config.digest import digest_of
from starquant.config.run import RunSpec
from starquant.diffusion import BatchSize, MaskPredictor
from starquant.evaluation.compared_rows import Fidelity
from starquant.evaluation.fidelity import Reference, measure, take_reference
from starquant.evaluation.masked_fidelity import MaskedReference, measure_masked, take_masked_reference
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel
from starquant.runs.gguf import context_length
from starquant.runs.inputs import Loaded
from starquant.session.session import Session

#: How large a reference may be to be kept for the next run of the session.
KEPT_BYTES = 2**28

AnyReference = Reference | MaskedReference


def fidelity_reference(spec: RunSpec, loaded: Loaded, session: Session) -> AnyReference | None:
    """Return full precision's held-out trajectories or masked states; a small one serves the session's next run too.

    Returns:
        None where fidelity is not measured: of what no method is applied to, and on all processes but the first.

    Raises:
        StarquantError: an answer that does not fit the context.
    """
    if loaded.texts.fidelity is None or not spec.is_compared or not session.processes.first:
        return None
    references, key = session.memory.references, _key(spec, loaded, session)
    if key in references:
        return references[key]  # type: ignore[no-any-return]
    references.clear()
    reference = take(spec, loaded, session)
    if reference.nbytes <= KEPT_BYTES:
        references[key] = reference
    return reference


def take(spec: RunSpec, loaded: Loaded, session: Session) -> AnyReference:
    """Return the model's states on the texts that fidelity is measured on."""
    assert loaded.texts.fidelity is not None
    # A limit is items a task: fidelity's texts are held to it too.
    model, texts = loaded.model, loaded.texts.fidelity[: spec.tasks.limit]
    batch_size = BatchSize.of(spec.runtime.batch_size, model)
    options: dict[str, Any] = {"max_positions": spec.fidelity.positions, "progress": session.progress}
    if spec.fidelity.states is not None:
        # Seed 0: the same masks whatever the run's seed, since methods are compared on them.
        return take_masked_reference(model, texts, spec.fidelity.states, batch_size=batch_size, seed=0, **options)
    sampler = family_of(model).make_sampler(spec.model.trajectory)
    bos = family_of(model).bos_token_id(loaded.tokenizer)
    longest = context_length(spec, model.config)
    prompts = prompts_of(texts, sampler.answer_length, longest, "fidelity.source", bos)
    return take_reference(model, prompts, sampler, batch_size=batch_size, seed=spec.seed, **options)


def _key(spec: RunSpec, loaded: Loaded, session: Session) -> str:
    """Return what a reference depends on."""
    whole = spec.identity()
    for name in ("engine", "checkpoint", "file_fingerprint"):  # full precision is the checkpoint's, whatever computes
        whole["model"].pop(name, None)
    digest = digest_of({name: whole[name] for name in ("model", "fidelity", "seed")} | {"device": session.device})
    longest = context_length(spec, loaded.model.config)  # which prompts are cut to
    return f"{digest}-{spec.tasks.limit}-{spec.runtime.batch_size}-{longest}-{session.code.scoring}"


def measure_fidelity(
    spec: RunSpec,
    model: MaskedDiffusionModel,
    reference: AnyReference,
    session: Session,
    predict: MaskPredictor | None = None,
) -> Fidelity:
    """Compare the quantized model, or another engine's predictions, with the reference."""
    options: dict[str, Any] = {
        "bins": spec.fidelity.bins,
        "resamples": spec.fidelity.resamples,
        "seed": spec.seed,
        "batch_size": BatchSize.of(spec.runtime.batch_size, model),
        "progress": session.progress,
        "predict": predict,
    }
    if isinstance(reference, MaskedReference):
        return measure_masked(model, reference, **options)
    return measure(model, reference, **options)
