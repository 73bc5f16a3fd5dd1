"""The tasks of a run, scored; items that stand in the calibration text are counted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from starquant.calibration.batches import Segment
from starquant.calibration.overlap import item_overlap
from starquant.config.run import RunSpec
from starquant.diffusion import MaskPredictor
from starquant.models.cuda_graphs import compiled_blocks
from starquant.runs.inputs import Loaded
from starquant.session.session import Session

if TYPE_CHECKING:
    from starquant.evaluation.harness import Evaluation

log = logging.getLogger(__name__)


class OverlapCounter:
    """Counts evaluation items whose text stands in the calibration text, task by task."""

    def __init__(self, segments: list[Segment] | None) -> None:
        self._texts = [segment.text for segment in segments or ()]
        self.counts: dict[str, int] = {}

    def __call__(self, task: str, documents: list[str]) -> None:
        """Look at the documents of one task."""
        count = item_overlap(self._texts, documents) if self._texts else 0
        if count:
            self.counts[task] = count
            log.warning("%d of %d items of %s share text with the calibration data", count, len(documents), task)


def validate_tasks(spec: RunSpec, session: Session) -> None:
    """Judge the tasks of a run that has to be computed, before anything is: each suite once a session.

    Raises:
        StarquantError: a task that lm-eval does not know, items that cannot be read, fewer items than processes.
    """
    if spec.tasks.names:
        session.memory.tasks[suite_key(spec)] = session.processes.by_first(documents_of, spec, session)


def documents_of(spec: RunSpec, session: Session) -> dict[str, str]:
    """Return digests of the items of a run's tasks, leaf by leaf, of those that are read through the hub.

    Raises:
        StarquantError: as `validate_tasks`.
    """
    key = suite_key(spec)
    if spec.tasks.names and key not in session.memory.tasks:
        from starquant.evaluation import suites

        shots = {name: protocol.num_fewshot for name, protocol in spec.protocols.items()}
        with suites.quiet(spec.debug.verbose):
            session.memory.tasks[key] = suites.validate_tasks(spec.tasks, session.processes.world, shots)
    return session.memory.tasks.get(key, {})


def suite_key(spec: RunSpec) -> str:
    """Return what a session knows a run's tasks by, once they are judged."""
    return f"{spec.tasks.model_dump_json()} {[protocol.num_fewshot for protocol in spec.protocols.values()]}"


def evaluate_tasks(
    spec: RunSpec,
    loaded: Loaded,
    answers: Path,
    overlap: OverlapCounter,
    session: Session,
    predict: MaskPredictor | None = None,
) -> Evaluation:
    """Return scores and items of a run's tasks.

    Args:
        spec: of the run.
        loaded: with the model as it is to be scored.
        answers: folder that keeps single answers, so that a killed run goes on.
        overlap: looks at the items of every task.
        session: where it happens.
        predict: another engine's predictions; None for the model's.

    Raises:
        StarquantError: a task that cannot be scored.
    """
    from starquant.evaluation.harness import evaluate  # seconds of imports that a finished cell does not need
    from starquant.evaluation.lm import DiffusionLM

    lm = DiffusionLM(
        loaded.model,
        loaded.tokenizer,
        batch_size=spec.runtime.batch_size,
        seed=spec.seed,
        speed=spec.speed,
        progress=session.progress,
        together=session.processes,
        predict=predict,
    )
    with compiled_blocks(loaded.model, spec.speed.compile):
        return evaluate(lm, spec.model, spec.tasks, answers, spec.debug.verbose, overlap)
