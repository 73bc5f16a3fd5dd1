"""One run as data: a frozen, validated, digestible description, built before torch is imported.

Every field either changes the digest or is declared `inert` (it cannot change a score): where things lie, how
fast they run, who is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from starquant.config.bits import FULL_PRECISION, BitsSpec
from starquant.config.calibration import CalibrationSpec, ExpertsSpec, FidelitySpec
from starquant.config.digest import digest_of, without_inert
from starquant.config.execution import DebugSpec, ExperimentSpec, ExportSpec, PathsSpec, RuntimeSpec, TrackerSpec
from starquant.config.fields import INERT, Seed, Spec
from starquant.config.messages import explain
from starquant.config.methods import METHODS
from starquant.config.methods.base import MethodOptions
from starquant.config.methods.none import FullPrecisionOptions
from starquant.config.model import ModelSpec
from starquant.config.protocol import TaskProtocol
from starquant.config.speed import SpeedSpec
from starquant.config.tasks import TasksSpec
from starquant.errors import ConfigError, nearest

#: Raised whenever a change of code changes scores: results of different versions are never taken for the same.
EVALUATION_VERSION = 1

NO_CALIBRATION = CalibrationSpec(name="none")


class RunSpec(Spec):
    """One run: a model, bits, a method, its calibration, the tasks that are scored, and the fidelity beside them."""

    model: ModelSpec
    bits: BitsSpec
    method: SerializeAsAny[MethodOptions]
    calibration: CalibrationSpec
    tasks: TasksSpec
    fidelity: FidelitySpec = FidelitySpec(name="none")
    speed: SpeedSpec = SpeedSpec()
    seed: Seed = 0
    tracker: TrackerSpec = Field(json_schema_extra=INERT)
    paths: PathsSpec = Field(json_schema_extra=INERT)
    runtime: RuntimeSpec = Field(default=RuntimeSpec(), json_schema_extra=INERT)
    debug: DebugSpec = Field(json_schema_extra=INERT)
    export: ExportSpec = Field(default=ExportSpec(), json_schema_extra=INERT)
    reuse: Literal["same_code", "any", "never"] = Field(default="same_code", json_schema_extra=INERT)
    stage: Literal["calibrate", "evaluate", "all", "inspect"] = Field(default="all", json_schema_extra=INERT)
    dry_run: bool = Field(default=False, json_schema_extra=INERT)
    experiment: ExperimentSpec = Field(default=ExperimentSpec(), json_schema_extra=INERT)

    BASELINE: ClassVar[MethodOptions] = FullPrecisionOptions(name="none")
    #: Algorithms for checkpoints that are quantized already, and for files of llama.cpp.
    PACKED: ClassVar[str] = "packed"
    GGUF: ClassVar[str] = "gguf"

    @field_validator("method", mode="plain")
    @classmethod
    def _validate_method(cls, value: Any) -> MethodOptions:
        if isinstance(value, MethodOptions):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"method: got {value!r}, allowed: the options of a method")
        algorithm = value.get("algorithm")
        if not isinstance(algorithm, str):
            got = "missing" if algorithm is None else f"got {algorithm!r}"
            raise ValueError(f"method.algorithm: {got}; allowed: {', '.join(METHODS)}")
        options = METHODS.options(algorithm).model_validate_json(json.dumps(dict(value)))
        if options.name != algorithm and options.name in METHODS:
            raise ValueError(
                f"method.name: got '{options.name}' for algorithm '{algorithm}', but another algorithm has that name; "
                "allowed: a name of its own"
            )
        return options

    @model_validator(mode="after")
    def _validate_whole(self) -> RunSpec:
        repeated = sorted({name for name in self.tasks.names if self.tasks.names.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks.names: {', '.join(repeated)} is named more than once")
        missing = [name for name in self.tasks.names if name not in self.model.protocol]
        if missing:
            raise ValueError(
                f"tasks.names: model '{self.model.name}' has no protocol for {', '.join(missing)}; "
                f"allowed: {', '.join(self.model.protocol)}.{nearest(missing[0], self.model.protocol)}"
            )
        self.speed.validate_protocols(self.protocols)
        if not self.tasks.names and self.fidelity.source is None:
            raise ValueError("tasks.names: got [], allowed: at least one task, or a fidelity other than 'none'")
        if not self.tasks.names and self.is_packed:
            raise ValueError("tasks.names: got [], but of a packed checkpoint fidelity is not measured")
        if not self.tasks.names and self._is_full_precision:
            raise ValueError("tasks.names: got [], but fidelity compares a quantized model with full precision")
        if self.runtime.packed != "auto" and not self.is_packed:
            raise ValueError(
                f"runtime.packed: got '{self.runtime.packed}' for method '{self.method.name}', allowed: auto (it is of "
                "packed checkpoints, method=packed)"
            )
        if self.method.needs_calibration and self.calibration.source is None:
            raise ValueError(
                f"calibration: method '{self.method.name}' needs calibration data, got '{self.calibration.name}'"
            )
        if self.method.propagates and self.calibration.inputs == "full_precision":
            raise ValueError(
                "calibration.inputs: got 'full_precision', but method.weights.propagation makes up for roundings in "
                "front of a linear; allowed: quantized, quantized_weights"
            )
        return self

    @property
    def protocols(self) -> dict[str, TaskProtocol]:
        """How the tasks that are scored are evaluated."""
        return {name: self.model.protocol[name] for name in self.tasks.names}

    @property
    def is_scored(self) -> bool:
        """Whether the run scores tasks: `stage` may end it before, or have it look at activations only."""
        return self.stage in ("all", "evaluate")

    @property
    def is_baseline(self) -> bool:
        """Whether the run is full precision."""
        return self.method.algorithm == self.BASELINE.algorithm

    @property
    def _is_full_precision(self) -> bool:
        """Whether nothing is changed: the baseline, or 16 bits under a method that changes the rounding only."""
        return self.is_baseline or (self.bits.full_precision and not self.method.transforms)

    @property
    def is_packed(self) -> bool:
        """Whether the run scores a checkpoint that is quantized already: no full precision stands beside it."""
        return self.method.algorithm == self.PACKED

    @property
    def is_gguf(self) -> bool:
        """Whether the run scores a file of llama.cpp, which full precision stands beside."""
        return self.method.algorithm == self.GGUF

    @property
    def quantizes(self) -> bool:
        """Whether the run fits a method and applies it."""
        return not (self.is_baseline or self.is_packed or self.is_gguf)

    @property
    def is_compared(self) -> bool:
        """Whether fidelity compares what is scored with full precision."""
        return self.quantizes or self.is_gguf

    def canonical(self) -> RunSpec:
        """Return the same run in its one spelling.

        Full precision is method `none` at 16 bits, whichever way it is spelled; bits are on the grid that `bits.grid`
        asks for; a packed checkpoint has no fidelity; tasks without the consent that they need are left out.
        """
        if (tasks := self.tasks.consented()) is not self.tasks:
            return self.model_copy(update={"tasks": tasks}).canonical()
        if self._is_full_precision:
            return self.baseline()
        fidelity = FidelitySpec(name="none") if self.is_packed else self.fidelity
        calibration = NO_CALIBRATION.model_copy(update={"threads": self.calibration.threads})
        if self.method.needs_calibration:
            calibration = self.method.calibration(self.calibration)
        speed = self.speed.applied(self.protocols)
        authors = self.method.authors
        bits = self.bits.on_grid_of(authors)
        method = self.method.at_bits(bits)
        if authors is not None and not authors.concerns(bits):  # one run on both grids
            method = method.model_copy(update={"authors": None})
        update = {"bits": bits, "method": method, "calibration": calibration, "fidelity": fidelity, "speed": speed}
        return self.model_copy(update=update)

    def baseline(self) -> RunSpec:
        """Return the full-precision run on the same model, tasks and seed."""
        nothing = {"calibration": NO_CALIBRATION, "fidelity": FidelitySpec(name="none")}
        speed = self.speed.applied(self.protocols)
        update = {"bits": FULL_PRECISION, "method": self.BASELINE, "speed": speed, **nothing}
        if self.model.engine != "torch":
            of_torch = {"engine": "torch", "path": self.model.checkpoint, "checkpoint": None, "file_fingerprint": None}
            update["model"] = self.model.model_copy(update=of_torch)
        return self.model_copy(update=update)

    def identity(self) -> dict[str, Any]:
        """Return what the digest is taken of: every field that can change a score."""
        identity = without_inert(self)
        identity["evaluation_version"] = EVALUATION_VERSION
        if self.model.fingerprint is not None:
            identity["model"].update(path=None, revision=None, checkpoint=None)
        if identity["method"].get("transform", {}).get("sites") == "all":
            del identity["method"]["transform"]["sites"]
        if not self.method.propagates and "weights" in identity["method"]:
            del identity["method"]["weights"]["propagation"]
        if self.model.engine == "torch":
            for name in ("engine", "checkpoint", "file_fingerprint"):
                del identity["model"][name]
        if self.tasks.data_fingerprint is not None:
            identity["tasks"]["data_dir"] = None
        for part in (identity["calibration"], identity["fidelity"]):
            if part["fingerprint"] is not None and part["source"] is not None:
                part["source"]["path"] = None
        follows = self.fidelity.source is not None and self.fidelity.states is None
        if not follows and self.calibration.states.sampler != "trajectory":
            identity["model"]["trajectory"] = None
        if self.calibration.threads == 1:
            del identity["calibration"]["threads"]
        if self.calibration.experts == ExpertsSpec():
            del identity["calibration"]["experts"]
        del identity["speed"]["name"]
        if self.speed.is_exact:  # what is exact is not another experiment
            del identity["speed"]
        if self.model.chat_template == "none" or not self.tasks.names:  # raw text, or no prompt of a task
            del identity["model"]["chat_template"]
        identity["bits"] = self.bits.identity()
        names = self.tasks.names  # protocols of tasks that are not scored change nothing
        identity["model"]["protocol"] = {n: identity["model"]["protocol"][n] for n in names}
        return identity

    def digest(self) -> str:
        """Return sixteen hexadecimal digits that identify the run."""
        return digest_of(self.identity())

    def calibration_identity(self) -> dict[str, Any]:
        """Return what a calibration is made of: runs that share it differ in tasks, fidelity and seed only."""
        whole = self.identity()
        scoring = ("name", "protocol", "chat_template")
        model = {name: value for name, value in whole["model"].items() if name not in scoring}
        if self.calibration.states.sampler != "trajectory" or self.calibration.source is None:
            model["trajectory"] = None
        return {"model": model} | {name: whole[name] for name in ("bits", "method", "calibration")}

    def calibration_digest(self) -> str:
        """Return sixteen hexadecimal digits that identify the calibration."""
        return digest_of(self.calibration_identity())

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RunSpec:
        """Validate a composed configuration.

        Raises:
            ConfigError: one line a problem: dotted path, what was got, what is allowed, the nearest name.
        """
        try:
            return cls.model_validate_json(json.dumps(config))
        except ValidationError as error:
            parts = {"method": _options_class(config)}
            raise ConfigError("\n".join(explain(cls, problem, parts) for problem in error.errors())) from None
        except TypeError as error:
            raise ConfigError(f"configuration is not plain data: {error}") from None


def _options_class(config: Mapping[str, Any]) -> type[MethodOptions]:
    """Return the class of the method's options, as far as the configuration says which method it is."""
    method = config.get("method")
    algorithm = method.get("algorithm") if isinstance(method, Mapping) else None
    return METHODS.options(algorithm) if isinstance(algorithm, str) and algorithm in METHODS else MethodOptions
