"""One run as data: a frozen, validated, digestible description, built before torch is imported.

Every field either changes the digest or is declared `inert` (it cannot change a score): where things lie, how
fast they run, who is told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from starquant.config.bits import FULL_PRECISION, BitsSpec
from starquant.config.calibration import CalibrationSpec, FidelitySpec
from starquant.config.digest import digest_of, without_inert
from starquant.config.fields import INERT, Count, Seed, Spec
from starquant.config.messages import explain
from starquant.config.model import ModelSpec
from starquant.config.protocol import TaskProtocol
from starquant.config.speed import SpeedSpec
from starquant.config.tasks import TasksSpec
from starquant.errors import ConfigError, nearest
from starquant.registry import Registry

#: Raised whenever a change of code changes scores: results of different versions are never taken for the same.
EVALUATION_VERSION = 1

METHODS = Registry(
    "method",
    {
        "none": "starquant.methods.none:FullPrecision",
        "packed": "starquant.methods.packed:PackedCheckpoint",
        "rtn": "starquant.methods.rtn:RTN",
        "smoothquant": "starquant.methods.smoothquant:SmoothQuant",
        "awq": "starquant.methods.awq:AWQ",
        "gptq": "starquant.methods.gptq:GPTQ",
        "quarot": "starquant.methods.quarot:QuaRot",
        "quarot_rtn": "starquant.methods.quarot:QuaRotRTN",
        "dllmquant_plus": "starquant.methods.dllmquant_plus:DLLMQuantPlus",
        "dllmquant_plus_plus": "starquant.methods.dllmquant_plus_plus:DLLMQuantPlusPlus",
        "star_quant": "starquant.methods.star_quant.method:STaRQuant",
        "star_quant_no_tac": "starquant.methods.star_quant.presets:STaRQuantNoTAC",
        "star_quant_no_sgat": "starquant.methods.star_quant.presets:STaRQuantNoSGAT",
        "star_quant_closed_form": "starquant.methods.star_quant.presets:STaRQuantClosedForm",
        "star_quant_plus": "starquant.methods.star_quant.presets:STaRQuantPlus",
    },
)

NO_CALIBRATION = CalibrationSpec(name="none")


class MethodOptions(Spec):
    """Base of a method's own options; each method file extends it."""

    name: str

    @property
    def needs_calibration(self) -> bool:
        """Whether `fit` reads calibration states under these options."""
        return False

    def calibration(self, asked: CalibrationSpec) -> CalibrationSpec:
        """Return what the method calibrates on; a method that prescribes its states says so here."""
        return asked


class TrackerSpec(Spec):
    """Who is told of a finished run. Inert as a whole."""

    name: Literal["none", "wandb"]
    project: str = "starquant"
    entity: str | None = None
    mode: Literal["online", "offline"] = "offline"
    dir: str | None = None
    timeout_s: Annotated[float, Field(gt=0.0)] = 30.0


class ExperimentSpec(Spec):
    """The sweep that a run belongs to, null for none. Inert as a whole."""

    name: str | None = None


class PathsSpec(Spec):
    """Where results are written. Inert as a whole."""

    results: Annotated[str, Field(min_length=1)]


class RuntimeSpec(Spec):
    """How a run is executed. Inert as a whole: scores depend on the batch size ("auto": by memory) by rounding only."""

    device: str = "cpu"
    batch_size: int | str = "auto"
    threads: Count | None = None

    @field_validator("batch_size", mode="before")
    @classmethod
    def _number_or_auto(cls, size: Any) -> Any:
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"got {size!r}, allowed: auto, or a whole number from 1")
        return size


class ExportSpec(Spec):
    """Where the quantized model is written as a packed checkpoint, null for nowhere. Inert as a whole."""

    dir: Annotated[str | None, AfterValidator(lambda folder: folder and os.path.expanduser(folder))] = None
    shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*[KMG]B$")] = "5GB"


class DebugSpec(Spec):
    """What is shown when things go wrong. Inert as a whole."""

    name: str
    traceback: bool = False
    verbose: bool = False


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
    experiment: ExperimentSpec = Field(default=ExperimentSpec(), json_schema_extra=INERT)

    BASELINE_METHOD: ClassVar[str] = "none"
    #: Of checkpoints that are quantized already.
    PACKED_METHOD: ClassVar[str] = "packed"

    @field_validator("method", mode="wrap")
    @classmethod
    def _method_options(cls, value: Any, handler: Any) -> MethodOptions:
        if isinstance(value, MethodOptions):
            return value
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError("method needs a name")
        return METHODS.load(value["name"]).Options.model_validate_json(json.dumps(dict(value)))  # type: ignore[no-any-return]

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        repeated = sorted({name for name in self.tasks.names if self.tasks.names.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks.names: {', '.join(repeated)} is named more than once")
        missing = [name for name in self.tasks.names if name not in self.model.protocol]
        if missing:
            raise ValueError(
                f"tasks.names: model '{self.model.name}' has no protocol for {', '.join(missing)}; "
                f"allowed: {', '.join(self.model.protocol)}.{nearest(missing[0], self.model.protocol)}"
            )
        self.speed.check(self.protocols)
        if not self.tasks.names and self.fidelity.source is None:
            raise ValueError("tasks.names: got [], allowed: at least one task, or a fidelity other than 'none'")
        if not self.tasks.names and self.is_packed:
            raise ValueError("tasks.names: got [], but of a packed checkpoint fidelity is not measured")
        rounds_only = not METHODS.load(self.method.name).card.transforms
        if not self.tasks.names and (self.is_baseline or (self.bits.full_precision and rounds_only)):
            raise ValueError("tasks.names: got [], but fidelity compares a quantized model with full precision")
        if self.method.needs_calibration and self.calibration.source is None:
            raise ValueError(
                f"calibration: method '{self.method.name}' needs calibration data, got '{self.calibration.name}'"
            )
        return self

    @property
    def protocols(self) -> dict[str, TaskProtocol]:
        """How the tasks that are scored are evaluated."""
        return {name: self.model.protocol[name] for name in self.tasks.names}

    @property
    def is_baseline(self) -> bool:
        """Whether the run is full precision."""
        return self.method.name == self.BASELINE_METHOD

    @property
    def is_packed(self) -> bool:
        """Whether the run scores a checkpoint that is quantized already: no full precision stands beside it."""
        return self.method.name == self.PACKED_METHOD

    @property
    def quantizes(self) -> bool:
        """Whether the run fits a method and applies it."""
        return not (self.is_baseline or self.is_packed)

    def canonical(self) -> RunSpec:
        """Return the same run in its one spelling.

        Full precision is method `none` at 16 bits, whichever way it is spelled; a packed checkpoint has no fidelity.
        """
        rounds_only = not METHODS.load(self.method.name).card.transforms
        if self.is_baseline or (self.bits.full_precision and rounds_only):
            return self.baseline()
        fidelity = FidelitySpec(name="none") if self.is_packed else self.fidelity
        calibration = NO_CALIBRATION
        if self.method.needs_calibration:
            calibration = self.method.calibration(self.calibration)
        speed = self.speed.applied(self.protocols)
        return self.model_copy(update={"calibration": calibration, "fidelity": fidelity, "speed": speed})

    def baseline(self) -> RunSpec:
        """Return the full-precision run on the same model, tasks and seed."""
        method = METHODS.load(self.BASELINE_METHOD).Options(name=self.BASELINE_METHOD)
        nothing = {"calibration": NO_CALIBRATION, "fidelity": FidelitySpec(name="none")}
        speed = self.speed.applied(self.protocols)
        return self.model_copy(update={"bits": FULL_PRECISION, "method": method, "speed": speed, **nothing})

    def identity(self) -> dict[str, Any]:
        """Return what the digest is taken of: every field that can change a score."""
        identity = without_inert(self)
        identity["evaluation_version"] = EVALUATION_VERSION
        if self.model.fingerprint is not None:
            identity["model"].update(path=None, revision=None)
        if self.tasks.data_fingerprint is not None:
            identity["tasks"]["data_dir"] = None
        for part in (identity["calibration"], identity["fidelity"]):
            if part["fingerprint"] is not None and part["source"] is not None:
                part["source"]["path"] = None
        if self.fidelity.source is None and self.calibration.states.sampler != "trajectory":
            identity["model"]["trajectory"] = None
        del identity["speed"]["name"]
        if self.speed.plain:  # what is exact is not another experiment
            del identity["speed"]
        names = self.tasks.names  # protocols of tasks that are not scored change nothing
        identity["model"]["protocol"] = {n: identity["model"]["protocol"][n] for n in names}
        return identity

    def digest(self) -> str:
        """Return sixteen hexadecimal digits that identify the run."""
        return digest_of(self.identity())

    def calibration_identity(self) -> dict[str, Any]:
        """Return what a calibration is made of: runs that share it differ in tasks, fidelity and seed only."""
        whole = self.identity()
        model = {name: value for name, value in whole["model"].items() if name not in ("name", "protocol")}
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
            raise ConfigError("\n".join(explain(cls, problem) for problem in error.errors())) from None
        except TypeError as error:
            raise ConfigError(f"configuration is not plain data: {error}") from None
