"""A run's evaluation, fidelity and calibration states, gone through with the counting stand-in."""

from __future__ import annotations

import copy
from dataclasses import replace

from starquant.calibration.batches import CalibrationStates
from starquant.config.run import RunSpec
from starquant.errors import DataError
from starquant.forecast.counting import SIZES, Answer, Counted, Passes
from starquant.forecast.rehearsal import tokens_of
from starquant.models.validation import DTYPES
from starquant.runs.calibrate import calibration_states
from starquant.runs.fidelity import AnyReference, measure_fidelity, take
from starquant.runs.inputs import Inputs, Loaded
from starquant.session.session import Session

#: Words that a generation chooses from, where its sampler names none by its id.
CHOICES = 4096
#: Settings of samplers that name words.
NAMES_WORDS = ("logits_eos_inf", "confidence_eos_eot_inf")


class StandIn:
    """A run with a model that only counts.

    Args:
        inputs: pinned.
        session: of the forecast.

    Raises:
        StarquantError: a method that does not fit the model, text that cannot be used.
    """

    def __init__(self, inputs: Inputs, session: Session) -> None:
        self.spec, self.session = inputs.spec, session
        tokenizer, self.skeleton, texts = inputs.validated()
        self.counted = Counted(copy.deepcopy(self.skeleton), session.device, DTYPES[self.spec.model.dtype])
        self.loaded = Loaded(self.counted.model, tokenizer, texts, 0.0)
        self.blocks = int(self.skeleton.config.num_hidden_layers)

    def _limited(self, limit: int) -> RunSpec:
        return self.spec.model_copy(update={"tasks": self.spec.tasks.model_copy(update={"limit": limit})})

    def states(self) -> tuple[CalibrationStates | None, float, Passes]:
        """Return calibration states of the first segments, the tokens of all, and the passes that record them."""
        segments = self.loaded.texts.calibration
        if segments is None:
            return None, 0.0, Passes()
        made: dict[int, CalibrationStates] = {}

        def answer(count: int) -> tuple[int, int]:
            some = replace(self.loaded, texts=replace(self.loaded.texts, calibration=segments[:count]))
            try:
                states = calibration_states(self.spec, some, self.session)
            except DataError:
                if count >= len(segments):
                    raise
                return 0, len(segments)  # too few for a state of every kind
            assert states is not None
            done = min(count, len(segments))
            made[done] = states
            return done, len(segments)

        passes = self.counted.extrapolated(answer, SIZES if self._records else (len(segments),))
        done = max(made)
        return made[done], tokens_of(made[done]) * len(segments) / done, passes

    @property
    def _records(self) -> bool:
        """Whether calibration states are recorded from trajectories."""
        return self.spec.calibration.states.sampler == "trajectory"

    def evaluation(self) -> dict[str, Passes]:
        """Return the passes of every task."""
        from starquant.evaluation.harness import answer_some
        from starquant.evaluation.lm import DiffusionLM

        spec = self.spec
        lm = DiffusionLM(
            self.loaded.model,
            self.loaded.tokenizer,
            batch_size=spec.runtime.batch_size,
            seed=spec.seed,
            speed=spec.speed.model_copy(update={"compile": False}),
        )

        def answer(name: str) -> Answer:
            return lambda count: answer_some(lm, spec.model, spec.tasks, name, count)

        passes: dict[str, Passes] = {}
        for name in spec.tasks.names:
            sampler = spec.model.protocol[name].sampler
            if sampler is None or any(getattr(sampler, setting, False) for setting in NAMES_WORDS):
                passes[name] = self.counted.extrapolated(answer(name))
                continue
            with self.counted.of_few_words(CHOICES) as share:
                few = self.counted.extrapolated(answer(name))
            with self.counted.of_few_words(CHOICES // 4) as more:
                fewer = self.counted.extrapolated(answer(name))
            # What grows with the words does so in proportion; what is left is done whatever their number.
            grows = max(0.0, few.seconds - fewer.seconds) / (1 - share / more) if more > share else 0.0
            passes[name] = replace(few, seconds=few.seconds + grows * (share - 1))
        return passes

    def fidelity(self) -> dict[str, Passes]:
        """Return the passes of full precision's reference and of the comparison, nothing where it is not measured."""
        texts = (self.loaded.texts.fidelity or [])[: self.spec.tasks.limit]
        references: dict[int, AnyReference] = {}
        if not texts:
            return {}

        def reference(count: int) -> tuple[int, int]:
            references[count] = take(self._limited(count), self.loaded, self.session)
            return min(count, len(texts)), len(texts)

        def compare(count: int) -> tuple[int, int]:
            measure_fidelity(self._limited(count), self.loaded.model, references[count], self.session)
            return min(count, len(texts)), len(texts)

        taken = self.counted.extrapolated(reference)
        return {"reference": taken, "fidelity": self.counted.extrapolated(compare, tuple(references))}
