"""Overrides of a command line: parsed by Hydra's grammar, expanded into cells, refused with the nearest name."""

from __future__ import annotations

import functools
import itertools
import math
import re
import shlex
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ConfigDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from starquant.config.messages import LONGEST_SHOWN
from starquant.config.methods import METHODS
from starquant.errors import ConfigError, nearest
from starquant.resources import resource
from starquant.sweeps.faults import CompositionError

CONF = resource("conf")
#: What a launcher needs beside the package: module, and the extra that installs it.
LAUNCHER_EXTRAS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "joblib_gpu": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray"),
    "ray_gpu": ("hydra_plugins.hydra_ray_launcher", "ray"),
}
#: Cells of a sweep, at most: more take minutes to judge, and are a slip. Our choice.
MOST_CELLS = 20_000
#: What Hydra reads and composes with: an exception that rises there is of a configuration.
READERS = ("hydra", "omegaconf", "yaml", "antlr4")
#: Name of an option, without interpolation or folder.
WORD = re.compile(r"[A-Za-z0-9_]+")
#: Composes a configuration from overrides.
Compose = Callable[[list[str]], DictConfig]


class Groups:
    """The groups of the configuration and their options, wherever Hydra looks for them.

    Args:
        loader: Hydra's.
        searched: overrides that name further folders (hydra.searchpath).
    """

    def __init__(self, loader: ConfigLoader, searched: Sequence[str] = ()) -> None:
        self._loader, self.searched = loader, list(searched)
        self.names = frozenset(self._listed("", ObjectType.GROUP)) - {"hydra"}

    def _listed(self, group: str, kind: ObjectType) -> list[str]:
        return self._loader.get_group_options(group, kind, overrides=self.searched)

    def options(self, group: str) -> list[str]:
        """Return the options of a group, sorted."""
        return sorted(set(self._listed(group, ObjectType.CONFIG)))

    def is_contained(self, group: str, option: str) -> bool:
        """Return whether an option, with those of its group that it is based on, writes below its group only.

        Of folders that are searched beside conf/ nothing is known.
        """
        repository = getattr(self._loader, "repository", None)
        if repository is None or any("searchpath" in word for word in self.searched):
            return False
        file = repository.load_config(f"{group}/{option}")
        if file is None or file.header.get("package"):
            return False
        based = [default for default in file.defaults_list if getattr(default, "path", None) != "_self_"]
        return all(
            type(default) is ConfigDefault
            and default.package is None
            and WORD.fullmatch(default.path or "") is not None
            and self.is_contained(group, str(default.path))
            for default in based
        )


def parse_overrides(words: Sequence[str], loader: ConfigLoader) -> list[Override]:
    """Parse KEY=VALUE words; raises CompositionError, which says how to quote a value that is none of the grammar."""
    parser = _parser(loader)
    overrides = []
    for word in words:
        try:
            overrides += parser.parse_overrides([word])
        except (HydraException, ValueError, RecursionError) as error:  # ValueError: a number of too many digits
            raise CompositionError(_unparsed(word, first_line(error), parser)) from None
    return overrides


@functools.lru_cache(maxsize=2)
def _parser(loader: ConfigLoader) -> OverridesParser:
    """Return a loader's parser: making one takes as long as parsing a hundred words."""
    return OverridesParser.create(config_loader=loader)


def _unparsed(word: str, why: str, parser: OverridesParser) -> str:
    key, equals, value = word.partition("=")
    shown = word if len(word) <= LONGEST_SHOWN else f"{word[:LONGEST_SHOWN]}..."
    try:
        parser.parse_override(quoted(key, value))
    except (HydraException, ValueError, RecursionError):
        return f"{shown}: not an override ({why[:LONGEST_SHOWN]}); allowed: KEY=VALUE, +KEY=VALUE, ~KEY"
    got = shown[len(key) + len(equals) :]
    why = why[:LONGEST_SHOWN]
    if value[:1] in {*"[{'\""}:
        return f"{key}: got {got}, which is not a list, an object or a quoted text to its end ({why})"
    return f"{key}: got {got}, unquoted ({why}); quote it: {in_shell(key, value)}"


def quoted(key: str, value: str) -> str:
    """Return an override whose value is a text, whatever is in it."""
    return f"{key}={QuotedString(value, Quote.double).with_quotes()}"


def in_shell(key: str, value: str) -> str:
    """Return the same as it is typed, shortened where it is long."""
    return shlex.quote(quoted(key, value if len(value) <= LONGEST_SHOWN else "..."))


def task_words(overrides: Iterable[Override]) -> list[str]:
    """Return the words that concern the runs."""
    return [override.input_line or "" for override in overrides if not override.is_hydra_override()]


def hydra_words(overrides: Iterable[Override]) -> list[str]:
    """Return the words that concern Hydra's own settings."""
    return [override.input_line or "" for override in overrides if override.is_hydra_override()]


def is_of_configuration(error: Exception) -> bool:
    """Return whether Hydra has met words or files that it cannot read or put together."""
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError | RecursionError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return any(set(Path(frame.filename).parts) & {*READERS} for frame in frames[-4:])


def first_line(error: BaseException, searched: Sequence[str] = ()) -> str:
    """Return an error as a line: with its key, of YAML with file and place, with its cause where that says more.

    Args:
        error: of the configuration.
        searched: overrides that name further folders of it.
    """
    cause = error.__cause__
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: not valid YAML: {error.problem}"
    if isinstance(cause, MarkedYAMLError | OSError):
        return first_line(cause)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: cannot be read: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return f"{_not_utf8(searched) or 'a file of the configuration'}: not UTF-8 ({error.reason})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    key = getattr(error, "full_key", None)
    if key:
        return f"{key}: {line}"
    return f"{line}: {first_line(cause)}" if isinstance(cause, OmegaConfBaseException) else line


def _not_utf8(searched: Iterable[str]) -> Path | None:
    """Return the first file of the configuration's groups that is not UTF-8."""
    folders = [str(CONF)]
    for word in searched:
        listed = OverridesParser.create().parse_override(word).value()
        folders += [str(url).removeprefix("file://") for url in listed] if isinstance(listed, list) else []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*/*.yaml"))):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return path
        except OSError:
            continue
    return None


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
    options = list(itertools.islice(override.sweep_string_iterator(), MOST_CELLS + 1))
    if len(options) > MOST_CELLS:
        raise ConfigError(
            f"{override.input_line}: more than {MOST_CELLS:,} values; allowed: at most {MOST_CELLS:,} cells"
        )
    return options


def expand(overrides: Iterable[Override]) -> Iterator[list[str]]:
    """Yield the words of every cell: the product, the last key turning fastest, a repeated key overridden in its place.

    Raises:
        ConfigError: a sweep that cannot be enumerated (interval), or of more cells than `MOST_CELLS`.
    """
    words: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_delete():
            words[key] = [override.input_line or key]
        else:
            words[key] = [f"{key}={option}" for option in options_of(override)]
    count = math.prod(map(len, words.values()))
    if count > MOST_CELLS:
        swept = ", ".join(f"{len(options):,} of {key}" for key, options in words.items() if len(options) > 1)
        raise ConfigError(f"the sweep has {count:,} cells ({swept}); allowed: at most {MOST_CELLS:,}")
    return map(list, itertools.product(*words.values()))


def diagnose(error: Exception, words: Sequence[str], groups: Groups, compose: Compose) -> CompositionError:
    """Return the clearest account of why `words` do not compose: the first key that is not there, or Hydra's line."""
    chosen = [word for word in words if word.partition("=")[0] in groups.names]
    try:
        base = OmegaConf.to_container(compose(chosen))
    except Exception as again:
        if not is_of_configuration(again):
            raise
        return CompositionError(first_line(error, groups.searched))
    for word in words:
        key = word.partition("=")[0]
        if key not in groups.names and not key.startswith(("+", "~")):
            unknown = _unknown_key(base, key)
            if unknown is not None:
                return unknown
    return CompositionError(first_line(error, groups.searched))


def _unknown_key(config: object, dotted: str) -> CompositionError | None:
    here = config
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        names = [str(name) for name in here if name != "hydra"] if isinstance(here, dict) else []
        if not isinstance(here, dict) or part not in here:
            where = ".".join(parts[: depth + 1])
            allowed = ", ".join(names) or "nothing"
            return CompositionError(
                f"{where}: unknown key; allowed: {allowed}.{nearest(part, names)} "
                f"(an optional field that is not listed is added with +{dotted}=...)"
            )
        here = here[part]
    return None
