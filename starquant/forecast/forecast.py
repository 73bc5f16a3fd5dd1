"""The forecast of a run: its stages with their passes, operations and seconds, and what it takes of memory and disk."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import psutil
import torch

from starquant.config.run import RunSpec
from starquant.errors import ConfigError
from starquant.forecast.costs import Costs, Stage
from starquant.forecast.missing import Missing
from starquant.forecast.stand_in import StandIn
from starquant.models.loading import validate_device
from starquant.runs.inputs import Inputs, pin
from starquant.runs.placement import on_disk, weight_bytes, work_bytes
from starquant.runs.preflight import validate_paths
from starquant.runs.record import store_of
from starquant.session.session import Session
from starquant.session.threads import cpu_threads
from starquant.store import provenance

#: Bytes of a weight file that are read to see how fast that is.
SAMPLE = 2**26


@dataclass(frozen=True)
class Forecast:
    """What a run is going to do.

    Attributes:
        name: of its record.
        stages: in order.
        memory: bytes that are held, by what they are.
        disk: bytes that are written, by what they are.
        took: seconds that the forecast itself took.
    """

    name: str
    stages: tuple[Stage, ...]
    memory: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)
    took: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all that is to be done."""
        return sum(stage.seconds for stage in self.stages)


def forecast(spec: RunSpec, first: bool = True) -> Forecast:
    """Tell what a run would do; nothing is written, and of the weights a piece is read, to see how fast that is.

    Args:
        spec: of the run.
        first: of the process, which has to be started.

    Raises:
        StarquantError: what the run itself would refuse before it computes; a run of which no forecast is made.
    """
    began, spec = time.perf_counter(), spec.model_copy(update={"dry_run": True})
    validate_paths(spec)
    validate_device(spec.runtime.device)
    if spec.is_packed or spec.is_gguf or spec.stage == "inspect":
        got = "stage=inspect" if spec.stage == "inspect" else f"method={spec.method.name}"
        raise ConfigError(f"dry_run: got {got}, of which no forecast is made; allowed: a run that calibrates or scores")
    session = Session(device=spec.runtime.device)
    session.memory.code = provenance.running_code()
    with cpu_threads(spec.runtime.threads):
        made = _forecast(pin(spec), session, _age() if first else 0.0)
    return replace(made, took=time.perf_counter() - began)


def _age() -> float:
    """Return the seconds that this process has run, with the imports of evaluation."""
    import starquant.evaluation.lm  # noqa: F401

    return float(time.time() - psutil.Process().create_time())


def _forecast(inputs: Inputs, session: Session, start: float) -> Forecast:
    spec, missing = inputs.spec, Missing.of(inputs.spec, session)
    name = store_of(spec).name(spec)
    if missing.nothing:
        return Forecast(name, (Stage("all of it", reused=True),))
    stand_in = StandIn(inputs, session)
    hollow = on_disk(spec, inputs.checkpoint, session.device)
    costs = Costs.measure(stand_in, missing)
    load = _load_seconds(inputs, costs.table_bytes if hollow else weight_bytes(spec, inputs.checkpoint))
    stages = [Stage("start", start), Stage("load", load), *costs.stages(missing, load)]
    memory, disk = _memory(inputs, hollow, costs), _disk(inputs, hollow, costs, missing)
    return Forecast(name, tuple(stages), memory, disk)


def _load_seconds(inputs: Inputs, size: float) -> float:
    """Return the seconds that so many bytes of weights take to read and to be judged, by a piece of the first file."""
    began = time.perf_counter()
    with inputs.checkpoint.files[0].open("rb") as file:
        piece = bytearray(file.read(SAMPLE))
    numbers = torch.frombuffer(piece, dtype=torch.uint8)[: len(piece) // 2 * 2].view(torch.bfloat16)
    for part in numbers.split(2**22):
        part.isfinite().all()
    return float((time.perf_counter() - began) * size / len(piece))


def _memory(inputs: Inputs, hollow: bool, costs: Costs) -> dict[str, float]:
    block = costs.block_weights * costs.itemsize
    weights = costs.table_bytes + block if hollow else weight_bytes(inputs.spec, inputs.checkpoint)
    what = "weights (tables and a block; the others on disk)" if hollow else "weights"
    held = costs.state_tokens * costs.width * costs.itemsize
    memory = {what: float(weights), "work on a block, at most": float(work_bytes(inputs.checkpoint))}
    return memory | ({"hidden states of calibration": held} if held and not hollow else {})


def _disk(inputs: Inputs, hollow: bool, costs: Costs, missing: Missing) -> dict[str, float]:
    spec, disk = inputs.spec, {}
    if missing.calibration and costs.fit.bytes:
        disk["calibration"] = float(costs.fit.bytes * costs.blocks)
    if hollow and spec.quantizes:
        disk["quantized blocks, while it runs"] = float(weight_bytes(spec, inputs.checkpoint))
    if missing.export:
        linears = costs.blocks * costs.block_weights
        others = weight_bytes(spec, inputs.checkpoint) - linears * costs.itemsize
        disk["export"] = linears * spec.bits.weights.bits / 8 + others
    return disk
