"""The cells of a command line: what each is named by, and what a whole sweep must agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from starquant.config.model import ModelSpec
from starquant.config.run import RunSpec
from starquant.config.tasks import validate_consent
from starquant.errors import ConfigError

#: What stands for a test-bed's model where a checkpoint is named.
TESTBEDS = get_args(ModelSpec.model_fields["testbed"].annotation)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its key (before checkpoints and data are looked at) and its specification."""

    key: str
    spec: RunSpec

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Cell:
        """Validate a composed configuration as plain data; raises ConfigError."""
        spec = RunSpec.from_config(_of_testbed(config))
        alone = "" if spec.is_scored else f"-{spec.stage}"
        return cls(spec.canonical().digest() + alone, spec)

    @property
    def results(self) -> Path:
        """Its results folder."""
        return Path(self.spec.paths.results)

    @property
    def name(self) -> str:
        """Model, bits, method and tasks."""
        spec = self.spec.canonical()
        model = spec.model.name if spec.model.seed is None else f"{spec.model.name}:{spec.model.seed}"
        names = spec.tasks.names
        tasks = "+".join(names) if 0 < len(names) <= 2 else spec.tasks.name
        stage = "" if spec.stage == "all" else f" ({spec.stage})"
        return f"{model} {spec.bits.name} {spec.method.name} {tasks}{stage}"


def _of_testbed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration whose model.path names a test-bed with that test-bed's model; `./tiny` is a folder."""
    model = config.get("model")
    if not isinstance(model, Mapping) or model.get("path") not in TESTBEDS:
        return config
    seed = 0 if model.get("seed") is None else model["seed"]
    return {**config, "model": {**model, "path": None, "testbed": model["path"], "seed": seed}}


@dataclass(frozen=True)
class Plan:
    """What a command line stands for, validated.

    Attributes:
        cells: one, or those of a sweep, each once.
        overrides: of each cell, as Hydra's launchers take them.
        sweep: whether Hydra's launcher runs them.
        config: the first cell's composed configuration with Hydra's own part.
    """

    cells: tuple[Cell, ...]
    overrides: tuple[tuple[str, ...], ...] = field(repr=False)
    sweep: bool
    config: DictConfig = field(repr=False, compare=False)

    @property
    def launcher(self) -> str:
        """Option of the launcher group, or of Hydra's own, which does without our presets."""
        choices = self.config.hydra.runtime.choices
        ours, hydras = (str(choices.get(name) or "basic") for name in ("launcher", "hydra/launcher"))
        return hydras if ours == "basic" else ours

    @property
    def experiment(self) -> str | None:
        """The sweep's name, None for none."""
        return self.cells[0].spec.experiment.name

    @property
    def benchmark(self) -> str | None:
        """The script that measures in place of the cells, None for none."""
        return self.cells[0].spec.experiment.benchmark

    @property
    def results(self) -> Path:
        """The one results folder."""
        return self.cells[0].results

    @property
    def name(self) -> str:
        """Name the sweep by its cells, not by the clock."""
        keys = hashlib.sha256(" ".join(sorted(cell.key for cell in self.cells)).encode()).hexdigest()[:12]
        return f"{self.experiment or 'sweep'}-{keys}"


def plain_of(config: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """Return a composed configuration as plain data, without Hydra's part, which resolves inside a job only."""
    if not resolve:
        whole = OmegaConf.to_container(config, resolve=False)
        return {name: value for name, value in whole.items() if name != "hydra"}  # type: ignore[union-attr]
    nodes = {str(name): config[name] for name in config if name != "hydra"}
    return {name: OmegaConf.to_container(n, resolve=True) if OmegaConf.is_config(n) else n for name, n in nodes.items()}


def validate_plan(plan: Plan) -> None:
    """Refuse cells that cannot be run together.

    Raises:
        ConfigError: two cells that export to one folder, a launcher for a single run.
    """
    exported = [cell.spec.export.dir for cell in plan.cells if cell.spec.export.dir is not None]
    if len(set(exported)) < len(exported):
        raise ConfigError(f"export.dir: got {exported[0]} for several cells of a sweep; allowed: a folder for each")
    if plan.launcher != "basic" and not plan.sweep:
        raise ConfigError(f"launcher: got '{plan.launcher}' for a single run; add -m")


def left_out_of(plan: Plan) -> dict[str, str]:
    """Return the tasks that a plan's cells leave out, and why.

    Raises:
        ConsentError: a task that needs consent is named by the command line, or a cell has no other.
    """
    left_out: dict[str, str] = {}
    for cell, words in zip(plan.cells, plan.overrides, strict=True):
        tasks = cell.spec.tasks
        if cell.spec.is_scored:
            named = any(word.lstrip("+").startswith("tasks.names=") for word in words)
            validate_consent(tasks if named else tasks.consented())
            left_out |= tasks.consented().left_out or {}
    return left_out


def validate_folders(folders: Sequence[str]) -> None:
    """Refuse several results folders; raises ConfigError."""
    if len(set(folders)) > 1:
        several = ", ".join(sorted(set(folders)))
        raise ConfigError(
            f"paths.results: got {several}; a sweep has one results folder (a name with a comma is quoted: "
            f"'paths.results=\"A,B\"')"
        )
