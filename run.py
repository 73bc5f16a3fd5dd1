"""Command line: `python run.py model=llada bits=w4a4`. Hydra composes, `starquant` judges and runs.

This file is the only one that knows Hydra. A configuration is validated before torch is imported.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Internal errors keep their whole traceback; errors of the user never reach Hydra's own printing.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
INTERACTIVE = sys.stderr.isatty() and not os.environ.get("CI")
if not INTERACTIVE:
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars too

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from starquant.errors import ConfigError, StarquantError, nearest
from starquant.preflight import check_paths
from starquant.spec import METHODS, RunSpec

CONF = Path(__file__).resolve().parent / "conf"
_NOT_A_RUN = {"--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i"}
_MULTIRUN = {"-m", "--multirun"}

failures: list[str] = []


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def cell(config: DictConfig) -> None:
    """Run one cell; an error of the user is kept for the end, so that a sweep goes on."""
    spec = validate(config)
    try:
        check_paths(spec)  # before torch is imported
        from starquant.pipeline import execute
        from starquant.tables.report import render

        result = execute(spec, progress=INTERACTIVE)
        print(render(result.record, result.baseline, result.path), flush=True)
        result.tracker.close()
    except StarquantError as error:
        if spec.debug.traceback:
            raise
        failures.append(str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)


def validate(config: DictConfig) -> RunSpec:
    """Turn a composed configuration into a specification; raises ConfigError."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return RunSpec.from_config({str(key): value for key, value in plain.items()})


def check(arguments: Sequence[str]) -> None:
    """Judge the command line before anything is run: every option of every sweep, once.

    Raises:
        ConfigError: a syntax error, unknown option, group or key, or a value that is not allowed.
    """
    flags = {a for a in arguments if a.startswith("-")}
    if flags & _NOT_A_RUN:
        return
    words = [a for a in arguments if not a.startswith(("-", "~")) or "=" in a]
    try:
        overrides = OverridesParser.create().parse_overrides([w for w in words if "=" in w])
    except HydraException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    for word in words:
        if "=" not in word and word not in ("job", "hydra", "all"):
            raise ConfigError(f"{word}: expected key=value")
    options = [list(_options(o, bool(flags & _MULTIRUN))) for o in overrides if not o.key_or_group.startswith("hydra")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for choice in _each_option_once(options):
            _check_one(choice)


def sweepable(arguments: Sequence[str]) -> list[str]:
    """Let `-m method=quarot,quarot_rtn method.qk_hadamard=true` through Hydra.

    Hydra composes a sweep once with the default of every swept group, which need not have the key; checked above, it
    may be added.
    """
    if not {*arguments} & _MULTIRUN:
        return list(arguments)
    keys = {argument: argument.split("=", 1)[0] for argument in arguments if "=" in argument}
    swept = {key for argument, key in keys.items() if "." not in key and "," in argument.split("=", 1)[1]}

    def added(argument: str) -> str:
        group, dot, _ = keys.get(argument, "").partition(".")
        return f"++{argument}" if dot and group in swept else argument

    return [added(argument) for argument in arguments]


def _options(override: Override, multirun: bool) -> Iterator[str]:
    """Yield the override once for each value it sweeps over; checks names of group options."""
    key = override.key_or_group
    prefix = override.input_line.split("=", 1)[0] if override.input_line else key
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    if override.is_sweep_override():
        if not multirun:
            raise ConfigError(f"{key}: got several values, {override.input_line}; add -m to run a sweep")
        if isinstance(override.value(), Glob):  # Hydra expands it to names that exist
            return
        values = [str(value) for value in override.sweep_string_iterator()]
    else:
        values = [override.get_value_element_as_str()]
    for value in values:
        if key in groups and not override.is_delete():
            names = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
            if key == "method" and value in METHODS and value not in names:
                raise ConfigError(f"method: '{value}' is registered, but conf/method/{value}.yaml is missing")
            if value not in names:
                raise ConfigError(f"{key}: got '{value}', allowed: {', '.join(names)}.{nearest(value, names)}")
        yield f"{prefix}={value}"


def _each_option_once(options: list[list[str]]) -> Iterator[list[str]]:
    options = [values for values in options if values]
    yield [values[0] for values in options]
    for index, values in enumerate(options):
        for value in values[1:]:
            yield [*(v[0] for v in options[:index]), value, *(v[0] for v in options[index + 1 :])]


def _check_one(overrides: list[str]) -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    chosen = [o for o in overrides if o.split("=")[0] in groups]
    base = OmegaConf.to_container(hydra.compose("config", overrides=chosen))
    for override in overrides:
        key = override.split("=", 1)[0]
        if key not in groups and not key.startswith(("+", "~")):
            _require_key(base, key)
    try:
        validate(hydra.compose("config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from None


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


def main() -> None:
    """Check, run, and say by the exit code whether every cell ended well."""
    try:
        check(sys.argv[1:])
        sys.argv[1:] = sweepable(sys.argv[1:])
        cell()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: finished answers are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    if failures:
        if len(failures) > 1:
            print("\n".join(itertools.chain([f"{len(failures)} cells failed:"], failures)), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
