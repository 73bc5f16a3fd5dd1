"""What the stages of a run cost: passes counted on the stand-in, seconds measured on a block of noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

from starquant.calibration.batches import CalibrationStates
from starquant.config.run import RunSpec
from starquant.forecast.counting import Passes
from starquant.forecast.missing import Missing
from starquant.forecast.rehearsal import FitCost, Rehearsal, Speed, block_of_noise, block_size
from starquant.forecast.stand_in import StandIn
from starquant.models.validation import DTYPES
from starquant.session.threads import cpu_threads

#: Words of the model that a method is rehearsed on.
FEW_WORDS = 512


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        name: as records call it.
        seconds: on this machine; 0 of what is there already.
        passes: through the model.
        tokens: of all passes.
        operations: of the blocks' linears and the head, a multiply-add as two.
        reused: there already.
        parts: that it consists of, the tasks of an evaluation.
    """

    name: str
    seconds: float = 0.0
    passes: float = 0.0
    tokens: float = 0.0
    operations: float = 0.0
    reused: bool = False
    parts: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Costs:
    """What the stages of a run consist of.

    Attributes:
        spec: of the run.
        blocks: of the model.
        block_weights: of a block's linears.
        table_weights: of the head.
        width: of the model.
        itemsize: bytes of a weight.
        passes: of the stages that run the model but evaluation.
        tasks: passes of every task.
        full: speed at full precision.
        quantized: speed of the quantized model, None where nothing is quantized.
        fit: of a block.
        apply: seconds of the tables, and of a block.
        state_tokens: of the calibration.
    """

    spec: RunSpec
    blocks: int
    block_weights: int
    table_weights: int
    width: int
    itemsize: int
    passes: dict[str, Passes]
    tasks: dict[str, Passes]
    full: Speed
    quantized: Speed | None
    fit: FitCost
    apply: tuple[float, float]
    state_tokens: float

    @property
    def table_bytes(self) -> float:
        """Of embedding and head."""
        return float(2 * self.table_weights * self.itemsize)

    @classmethod
    def measure(cls, stand_in: StandIn, missing: Missing) -> Costs:
        """Count passes on the stand-in, and rehearse the method on a block of noise."""
        spec, device, dtype = stand_in.spec, stand_in.session.device, DTYPES[stand_in.spec.model.dtype]
        quantizes = spec.quantizes and (missing.record or missing.export)
        passes, states, state_tokens = _passes_of(stand_in, missing, quantizes)
        tasks = stand_in.evaluation() if missing.record or missing.baseline else {}
        small = block_of_noise(stand_in.skeleton, device, dtype, FEW_WORDS)
        weights, fit, block_seconds = block_size(small), FitCost(), 0.0
        rehearsal = Rehearsal(small, spec.method, spec.bits, states, state_tokens)
        with cpu_threads(spec.calibration.threads):
            if missing.calibration or quantizes:
                fit = rehearsal.fit()
            if quantizes:
                block_seconds = rehearsal.apply(small, spec.seed)
        whole = block_of_noise(stand_in.skeleton, device, dtype)
        shapes = [shape for one in (*passes.values(), *tasks.values()) for shape in one.shapes]
        full, quantized, table_seconds = Speed.of(whole, shapes), None, 0.0
        if quantizes:
            with cpu_threads(spec.calibration.threads):
                table_seconds = max(0.0, rehearsal.apply(whole, spec.seed) - block_seconds)
            quantized = Speed.of(whole, shapes)
        embedding = whole.trunk().embedding
        return cls(
            spec=spec,
            blocks=stand_in.blocks,
            block_weights=weights,
            table_weights=embedding.num_embeddings * embedding.embedding_dim,
            width=embedding.embedding_dim,
            itemsize=dtype.itemsize,
            passes=passes,
            tasks=tasks,
            full=full,
            quantized=quantized,
            fit=fit,
            apply=(table_seconds, block_seconds),
            state_tokens=state_tokens,
        )

    def stages(self, missing: Missing, load: float) -> list[Stage]:
        """Return the stages behind loading."""
        spec, stages, scores = self.spec, [], bool(self.spec.tasks.names) and self.spec.is_scored
        if scores and not spec.is_baseline:
            stages.append(self._evaluation("full precision", self.full, missing.baseline))
        if "reference" in self.passes:
            stages.append(self._passes("reference", self.passes["reference"], self.full))
        if spec.quantizes:
            stages.append(self._calibrate(missing.calibration))
        apply = self.apply[0] + self.blocks * self.apply[1]
        if self.quantized is not None and missing.record:
            stages.append(Stage("quantize", apply))
        if scores:
            stages.append(self._evaluation("evaluate", self.quantized or self.full, missing.record))
        if "fidelity" in self.passes:
            assert self.quantized is not None
            stages.append(self._passes("fidelity", self.passes["fidelity"], self.quantized))
        if spec.export.dir is not None:  # the checkpoint is quantized once more, to codes
            stages.append(Stage("export", load + apply) if missing.export else Stage("export", reused=True))
        return stages

    def _passes(self, name: str, passes: Passes, speed: Speed) -> Stage:
        seconds = passes.seconds + speed.of_passes(passes, self.blocks)
        operations = 2 * (passes.tokens * self.block_weights * self.blocks + passes.logit_rows * self.table_weights)
        return Stage(name, seconds, passes.number, passes.tokens, operations)

    def _evaluation(self, name: str, speed: Speed, missing: bool) -> Stage:
        if not missing:
            return Stage(name, reused=True)
        whole = self._passes(name, sum(self.tasks.values(), Passes()), speed)
        return replace(whole, parts=tuple(self._passes(task, passes, speed) for task, passes in self.tasks.items()))

    def _calibrate(self, missing: bool) -> Stage:
        if not missing:
            return Stage("calibrate", reused=True)
        recorded = self._passes("calibrate", self.passes["calibrate"], self.full)
        walked = self.fit.walks * self.state_tokens
        return replace(
            recorded,
            seconds=recorded.seconds + self.fit.seconds * self.blocks,
            tokens=recorded.tokens + walked,
            operations=recorded.operations + 2 * walked * self.block_weights * self.blocks,
        )


def _passes_of(
    stand_in: StandIn, missing: Missing, quantizes: bool
) -> tuple[dict[str, Passes], CalibrationStates | None, float]:
    """Return the passes of each stage that runs the model, calibration states, and the tokens of all of them."""
    passes: dict[str, Passes] = {}
    states, state_tokens = None, 0.0
    if missing.calibration or quantizes:
        states, state_tokens, passes["calibrate"] = stand_in.states()
    if missing.record and stand_in.spec.quantizes:
        passes |= stand_in.fidelity()
    return passes, states, state_tokens
