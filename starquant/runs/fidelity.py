"""Fidelity within a run: full precision's trajectories before the model is quantized, the comparison after."""

from __future__ import annotations

from starquant.calibration.segments import prompts_of
from starquant.config.digest import digest_of
from starquant.config.run import RunSpec
from starquant.diffusion import BatchSize
from starquant.evaluation.fidelity import Fidelity, Reference, measure, take_reference
from starquant.models import family_of
from starquant.models.base import MaskedDiffusionModel
from starquant.runs.inputs import Loaded
from starquant.session.session import Session

#: How large a reference may be to be kept for the next run of the session.
KEPT_BYTES = 2**28


def fidelity_reference(spec: RunSpec, loaded: Loaded, session: Session) -> Reference | None:
    """Return full precision's held-out trajectories; a small reference serves the session's next run as well.

    Returns:
        None where fidelity is not measured: of full precision, and on all processes but the first.

    Raises:
        StarquantError: an answer that does not fit the context.
    """
    if loaded.texts.fidelity is None or not spec.quantizes or not session.processes.first:
        return None
    references, key = session.memory.references, _key(spec, session)
    if key in references:
        return references[key]  # type: ignore[no-any-return]
    references.clear()
    model, sampler = loaded.model, family_of(loaded.model).make_sampler(spec.model.trajectory)
    # A limit is items a task: fidelity's prompts are held to it too.
    texts = loaded.texts.fidelity[: spec.tasks.limit]
    reference = take_reference(
        model,
        prompts_of(texts, sampler.answer_length, model.config.context_length),
        sampler,
        batch_size=BatchSize.of(spec.runtime.batch_size, model),
        seed=spec.seed,
        max_positions=spec.fidelity.positions,
        progress=session.progress,
    )
    if reference.nbytes <= KEPT_BYTES:
        references[key] = reference
    return reference


def _key(spec: RunSpec, session: Session) -> str:
    """Return what a reference depends on."""
    whole = spec.identity()
    digest = digest_of({name: whole[name] for name in ("model", "fidelity", "seed")} | {"device": session.device})
    return f"{digest}-{spec.tasks.limit}-{spec.runtime.batch_size}-{session.code.scoring}"


def measure_fidelity(spec: RunSpec, model: MaskedDiffusionModel, reference: Reference, session: Session) -> Fidelity:
    """Compare the quantized model with the reference."""
    return measure(
        model,
        reference,
        bins=spec.fidelity.bins,
        resamples=spec.fidelity.resamples,
        seed=spec.seed,
        batch_size=BatchSize.of(spec.runtime.batch_size, model),
        progress=session.progress,
    )
