"""Overrides of a command line: parsed by Hydra's grammar, expanded into cells, refused with the nearest name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from starquant.config.methods import METHODS
from starquant.errors import ConfigError, nearest

CONF = Path(__file__).resolve().parents[2] / "conf"
#: What a launcher needs beside the package: module, and the extra that installs it.
LAUNCHER_EXTRAS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "joblib_gpu": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray"),
    "ray_gpu": ("hydra_plugins.hydra_ray_launcher", "ray"),
}
#: Composes a configuration from overrides.
Compose = Callable[[list[str]], DictConfig]


class Groups:
    """The groups of the configuration and their options, wherever Hydra looks for them.

    Args:
        loader: Hydra's.
        searched: overrides that name further folders (hydra.searchpath).
    """

    def __init__(self, loader: ConfigLoader, searched: Sequence[str] = ()) -> None:
        self._loader, self._searched = loader, list(searched)
        self.names = frozenset(self._listed("", ObjectType.GROUP)) - {"hydra"}

    def _listed(self, group: str, kind: ObjectType) -> list[str]:
        return self._loader.get_group_options(group, kind, overrides=self._searched)

    def options(self, group: str) -> list[str]:
        """Return the options of a group, sorted."""
        return sorted(set(self._listed(group, ObjectType.CONFIG)))


def parse_overrides(words: Sequence[str], loader: ConfigLoader) -> list[Override]:
    """Parse KEY=VALUE words; raises ConfigError."""
    try:
        return OverridesParser.create(config_loader=loader).parse_overrides(list(words))
    except HydraException as error:
        raise ConfigError(first_line(error)) from None


def task_words(overrides: Iterable[Override]) -> list[str]:
    """Return the words that concern the runs."""
    return [override.input_line or "" for override in overrides if not override.is_hydra_override()]


def hydra_words(overrides: Iterable[Override]) -> list[str]:
    """Return the words that concern Hydra's own settings."""
    return [override.input_line or "" for override in overrides if override.is_hydra_override()]


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or of its cause where Hydra leaves its own empty."""
    lines = str(error).strip().splitlines() or str(error.__cause__ or type(error).__name__).strip().splitlines()
    return lines[0]


def validate_option(override: Override, groups: Groups) -> None:
    """Refuse options of a group that do not exist, with the nearest name; raises ConfigError."""
    key = override.key_or_group
    if override.is_hydra_override() and override.is_sweep_override():
        raise ConfigError(f"{key}: got several values, {override.input_line}; Hydra's own settings are not swept")
    if key not in groups.names or override.is_delete():
        return
    swept = override.is_sweep_override()
    if swept and key in ("experiment", "launcher"):
        raise ConfigError(f"{key}: got several values, {override.input_line}; a command line has one {key}")
    names = groups.options(key)
    for option in map(str, options_of(override)):
        if key == "method" and option in METHODS and option not in names:
            raise ConfigError(f"method: '{option}' is registered, but conf/method/{option}.yaml is missing")
        if option not in names:
            raise ConfigError(f"{key}: got '{option}', allowed: {', '.join(names)}.{nearest(option, names)}")
        if key == "launcher" and option in LAUNCHER_EXTRAS:
            module, extra = LAUNCHER_EXTRAS[option]
            if not _installed(module):
                raise ConfigError(f"launcher: got '{option}', which needs: pip install 'starquant[{extra}]'")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def options_of(override: Override) -> list[str]:
    """Return what an override stands for, one option a cell; raises ConfigError where they cannot be enumerated."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.key_or_group}: got {override.input_line}, allowed: a list, range or glob")
    return list(override.sweep_string_iterator())


def expand(overrides: Iterable[Override]) -> Iterator[list[str]]:
    """Yield the words of every cell: the product, the last key turning fastest, a repeated key overridden in its place.

    Raises:
        ConfigError: a sweep that cannot be enumerated (interval).
    """
    words: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_delete():
            words[key] = [override.input_line or key]
        else:
            words[key] = [f"{key}={option}" for option in options_of(override)]
    return map(list, itertools.product(*words.values()))


def diagnose(error: Exception, words: Sequence[str], groups: Groups, compose: Compose) -> ConfigError:
    """Return the clearest account of why `words` do not compose: the first key that is not there, or Hydra's line."""
    chosen = [word for word in words if word.partition("=")[0] in groups.names]
    try:
        base = OmegaConf.to_container(compose(chosen))
    except (HydraException, OmegaConfBaseException):
        return ConfigError(first_line(error))
    for word in words:
        key = word.partition("=")[0]
        if key not in groups.names and not key.startswith(("+", "~")):
            unknown = _unknown_key(base, key)
            if unknown is not None:
                return unknown
    return ConfigError(first_line(error))


def _unknown_key(config: object, dotted: str) -> ConfigError | None:
    here = config
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        names = [str(name) for name in here if name != "hydra"] if isinstance(here, dict) else []
        if not isinstance(here, dict) or part not in here:
            where = ".".join(parts[: depth + 1])
            allowed = ", ".join(names) or "nothing"
            return ConfigError(
                f"{where}: unknown key; allowed: {allowed}.{nearest(part, names)} "
                f"(an optional field that is not listed is added with +{dotted}=...)"
            )
        here = here[part]
    return None
