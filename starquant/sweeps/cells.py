"""From a command line to the cells it stands for, judged before anything is run. Beside run.py the only file that knows
Hydra: groups, overrides, sweeps and experiments are its own; what a composed configuration may hold, `spec.py` judges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from starquant.config.methods import METHODS
from starquant.config.run import RunSpec
from starquant.errors import ConfigError, nearest

CONF = Path(__file__).resolve().parents[2] / "conf"
NO_RUN = {"--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i"}
SHOW = {"--cfg", "-c"}
MULTIRUN = {"-m", "--multirun"}
#: What a launcher needs beside the package: module, and the extra that installs it.
LAUNCHER_EXTRAS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "joblib_gpu": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray"),
    "ray_gpu": ("hydra_plugins.hydra_ray_launcher", "ray"),
}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its key (before checkpoints and data are looked at) and its specification."""

    key: str
    spec: RunSpec

    @classmethod
    def of(cls, config: DictConfig) -> Cell:
        """Judge a composed configuration; raises ConfigError."""
        spec = validate(config)
        alone = f"-{spec.stage}" if spec.stage in ("calibrate", "inspect") else ""  # they score nothing
        return cls(spec.canonical().digest() + alone, spec)

    @property
    def name(self) -> str:
        """Model, bits, method and tasks."""
        spec = self.spec.canonical()
        model = spec.model.name if spec.model.seed is None else f"{spec.model.name}:{spec.model.seed}"
        names = spec.tasks.names
        tasks = "+".join(names) if 0 < len(names) <= 2 else spec.tasks.name
        stage = "" if spec.stage == "all" else f" ({spec.stage})"
        return f"{model} {spec.bits.name} {spec.method.name} {tasks}{stage}"


@dataclass(frozen=True)
class Plan:
    """What a command line stands for.

    Attributes:
        cells: one, or those of a sweep, each once.
        sweep: whether Hydra's launcher runs them.
        launcher: option of the launcher group.
        experiment: the sweep's name, None for none.
    """

    cells: tuple[Cell, ...]
    sweep: bool
    launcher: str
    experiment: str | None

    @property
    def name(self) -> str:
        """Name the sweep by its cells, not by the clock."""
        keys = hashlib.sha256(" ".join(sorted(cell.key for cell in self.cells)).encode()).hexdigest()[:12]
        return f"{self.experiment or 'sweep'}-{keys}"


def validate(config: DictConfig) -> RunSpec:
    """Turn a composed configuration into a specification; raises ConfigError."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return RunSpec.from_config({str(key): value for key, value in plain.items()})


def plan(arguments: Sequence[str]) -> Plan | None:
    """Compose and judge every cell of a command line; None where it runs nothing (--help, --cfg).

    Raises:
        ConfigError: a syntax error, unknown option, group or key, a value that is not allowed, several values without
            -m, a launcher that is not installed.
    """
    flags = {a for a in arguments if a.startswith("-") and "=" not in a}
    if flags & NO_RUN:
        return None
    shows = {argument.split("=", 1)[0] for argument in arguments} & SHOW
    words = [a for a in arguments if not a.startswith(("-", "~")) or "=" in a]
    words = [a for a in words if not (shows and a in ("job", "hydra", "all")) and a.split("=", 1)[0] not in SHOW]
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word}: expected key=value")
    given = [word for word in words if "=" in word]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [o for o in _parsed(given) if not o.key_or_group.startswith("hydra")]
        for override in overrides:
            _judge_names(override)
        launcher, sweep, params = _of_experiment(overrides)
        sweep = sweep or bool(flags & MULTIRUN)
        for override in overrides if not sweep else ():
            if override.is_sweep_override():
                raise ConfigError(
                    f"{override.key_or_group}: got several values, {override.input_line}; add -m to run a sweep"
                )
        own = {override.key_or_group for override in overrides}
        swept = _parsed([f"{key}={value}" for key, value in params.items() if key not in own])
        cells: dict[str, Cell] = {}
        folders: set[str] = set()
        for choice in _choices([*swept, *overrides]):
            cell = _compose(choice)
            cells.setdefault(cell.key, cell)
            folders.add(cell.spec.paths.results)
    if not cells:
        raise ConfigError("the sweep has no cells: one of its keys has no value")
    if shows:
        return None
    exported = [cell.spec.export.dir for cell in cells.values() if cell.spec.export.dir is not None]
    if len(set(exported)) < len(exported):
        raise ConfigError(f"export.dir: got {exported[0]} for several cells of a sweep; allowed: a folder for each")
    if launcher != "basic" and not sweep:
        raise ConfigError(f"launcher: got '{launcher}' for a single run; add -m")
    if len(folders) > 1:
        raise ConfigError(f"paths.results: got {', '.join(sorted(folders))}; a sweep has one results folder")
    return Plan(tuple(cells.values()), sweep, launcher, next(iter(cells.values())).spec.experiment.name)


def _parsed(words: Sequence[str]) -> list[Override]:
    try:
        loader = GlobalHydra.instance().config_loader()
        return OverridesParser.create(config_loader=loader).parse_overrides(list(words))
    except HydraException as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _groups() -> set[str]:
    return {path.name for path in CONF.iterdir() if path.is_dir()}


def _judge_names(override: Override) -> None:
    """Refuse options of a group that do not exist, with the nearest name."""
    key = override.key_or_group
    if key not in _groups() or override.is_delete():
        return
    swept = override.is_sweep_override()
    values = list(override.sweep_string_iterator()) if swept else [override.get_value_element_as_str()]
    if swept and key in ("experiment", "launcher"):
        raise ConfigError(f"{key}: got several values, {override.input_line}; a command line has one {key}")
    names = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
    for value in map(str, values):
        if key == "method" and value in METHODS and value not in names:
            raise ConfigError(f"method: '{value}' is registered, but conf/method/{value}.yaml is missing")
        if value not in names:
            raise ConfigError(f"{key}: got '{value}', allowed: {', '.join(names)}.{nearest(value, names)}")
        if key == "launcher" and value in LAUNCHER_EXTRAS:
            module, extra = LAUNCHER_EXTRAS[value]
            if not _installed(module):
                raise ConfigError(f"launcher: got '{value}', which needs: pip install 'starquant[{extra}]'")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _of_experiment(overrides: Iterable[Override]) -> tuple[str, bool, dict[str, Any]]:
    """Return the launcher, whether the configuration is a sweep by itself, and what it sweeps over."""
    chosen = {o.key_or_group: o.get_value_element_as_str() for o in overrides if not o.is_sweep_override()}
    words = [f"{group}={chosen[group]}" for group in ("experiment", "launcher") if group in chosen]
    settings = hydra.compose("config", overrides=words, return_hydra_config=True).hydra
    swept = settings.mode == RunMode.MULTIRUN
    params = OmegaConf.to_container(settings.sweeper.params) if settings.sweeper.params else {}
    assert isinstance(params, dict)
    return chosen.get("launcher", "basic"), swept, {str(key): value for key, value in params.items()}


def _choices(overrides: list[Override]) -> Iterator[list[str]]:
    """Yield the overrides of every cell, in Hydra's own order."""
    prefixes = {o.get_key_element(): (o.input_line or "").split("=", 1)[0] or o.get_key_element() for o in overrides}
    try:
        choices = BasicSweeper.split_arguments(overrides, None)[0]
    except HydraException as error:
        raise ConfigError(str(error)) from None
    for words in choices:
        yield [f"{prefixes[word.split('=', 1)[0]]}={word.split('=', 1)[1]}" for word in words]


def _compose(overrides: list[str]) -> Cell:
    try:
        return Cell.of(hydra.compose("config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        _judge_keys(overrides)
        raise ConfigError(str(error).splitlines()[0]) from None


def _judge_keys(overrides: list[str]) -> None:
    """Refuse the first key that is not there, with the nearest name."""
    groups = _groups()
    chosen = [override for override in overrides if override.split("=")[0] in groups]
    base = OmegaConf.to_container(hydra.compose("config", overrides=chosen))
    for override in overrides:
        key = override.split("=", 1)[0]
        if key not in groups and not key.startswith(("+", "~")):
            _require_key(base, key)


def _require_key(config: object, dotted: str) -> None:
    here = config
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        names = list(map(str, here)) if isinstance(here, dict) else []
        if not isinstance(here, dict) or part not in here:
            where = ".".join(parts[: depth + 1])
            allowed = ", ".join(names) or "nothing"
            raise ConfigError(
                f"{where}: unknown key; allowed: {allowed}.{nearest(part, names)} "
                f"(an optional field that is not listed is added with +{dotted}=...)"
            )
        here = here[part]


def sweepable(arguments: Sequence[str], sweep: bool) -> list[str]:
    """Let `-m method=quarot,quarot_rtn method.qk_hadamard=true` through Hydra.

    Hydra composes a sweep once with the default of every swept group, which need not have the key; judged above, it
    may be added.
    """
    if not sweep:
        return list(arguments)
    keys = {argument: argument.split("=", 1)[0] for argument in arguments if "=" in argument}
    swept = {key for argument, key in keys.items() if "." not in key and "," in argument.split("=", 1)[1]}

    def added(argument: str) -> str:
        group, dot, _ = keys.get(argument, "").partition(".")
        return f"++{argument}" if dot and group in swept else argument

    return [added(argument) for argument in arguments]
