"""`starquant run model=llada bits=w4a4`, `python run.py -m bits=w8a8,w4a4`: from words to an exit code.

A command line is parsed, composed and validated before torch is imported. A single run is a job of its own; a sweep
goes through the sweeper to Hydra's launchers.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.override_parser.types import Override
from hydra.core.utils import env_override, run_job
from hydra.types import HydraContext
from omegaconf import DictConfig

from starquant.errors import ConfigError, StarquantError, expand_home, nearest, show_error
from starquant.session.processes import launched_rank
from starquant.sweeps.benchmark import measure
from starquant.sweeps.cell_log import CellEntry
from starquant.sweeps.cells import Plan, validate_plan
from starquant.sweeps.composition import Composer
from starquant.sweeps.jobs import CellRunner
from starquant.sweeps.launchers import validate_launcher
from starquant.sweeps.overrides import (
    CONF,
    Groups,
    first_line,
    hydra_words,
    in_shell,
    is_of_configuration,
    parse_overrides,
    quoted,
    task_words,
    validate_option,
)
from starquant.sweeps.running import run
from starquant.sweeps.sweeper import CellSweeper, opened, sweeper_of

#: This command line in a process of its own.
ALONE = "import sys; from starquant.sweeps.command_line import main; sys.exit(main())"


@dataclass(frozen=True)
class CommandLine:
    """The words of a command line, by what they are for.

    Attributes:
        overrides: KEY=VALUE, +KEY=VALUE, ~KEY; those of Hydra's own settings among them.
        multirun: whether `-m` is there.
        answers: Hydra answers (--help, --info, --shell-completion), nothing is composed here.
        shows: the configuration is shown (--cfg), nothing is run.
    """

    overrides: tuple[str, ...]
    multirun: bool = False
    answers: bool = False
    shows: bool = False

    @property
    def searched(self) -> list[str]:
        """Those that name further folders of the configuration."""
        return [word for word in self.overrides if word.startswith("hydra.searchpath=")]


class _Parser(argparse.ArgumentParser):
    """Hydra's options, less those that replace conf/ by another configuration."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        self.add_argument("overrides", nargs="*")
        for names in (["--help", "-h"], ["--hydra-help"], ["--version"], ["--shell-completion", "-sc"]):
            self.add_argument(*names, action="store_const", const=True, dest="answers")
        self.add_argument("--info", "-i", nargs="?", const="all")
        self.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
        self.add_argument("--resolve", action="store_true")
        self.add_argument("--package", "-p")
        self.add_argument("--run", "-r", action="store_true")
        self.add_argument("--multirun", "-m", action="store_true")
        self.add_argument("--config-dir", "-cd")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def names(self) -> list[str]:
        """Return the options in their long spelling."""
        return sorted(name for name in self._option_string_actions if name.startswith("--"))


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Parse Hydra's options and the overrides.

    Raises:
        ConfigError: an unknown option, a word that is no override, a configuration folder that is not there.
    """
    parser = _Parser()
    options, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        names = parser.names()
        raise ConfigError(f"{unknown[0]}: unknown option; allowed: {', '.join(names)}.{nearest(unknown[0], names)}")
    for word in arguments:
        _validate_characters(word)
    words = list(options.overrides)
    answers = bool(options.answers or options.info)
    for word in words if not answers else ():
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"{word}: expected key=value")
    if options.cfg and options.multirun:
        raise ConfigError("--cfg: got -m too; one configuration is shown")
    if options.config_dir is not None:
        words.append(_searched(options.config_dir))
    return CommandLine(tuple(words), options.multirun, answers, options.cfg is not None)


def _validate_characters(word: str) -> None:
    if any(character < " " or 0xD800 <= ord(character) < 0xE000 for character in word):
        raise ConfigError(f"{word!a}: allowed: one line of UTF-8 text (LC_ALL=C.UTF-8 where the terminal has none)")


def _searched(folder: str) -> str:
    """Return --config-dir as the override that jobs compose with."""
    try:
        path = Path(expand_home(folder))
        if not path.is_dir():
            raise ConfigError(f"--config-dir: {folder}: no such folder")
    except (ValueError, OSError) as error:
        raise ConfigError(f"--config-dir: {folder}: {error}") from None
    _, _, text = quoted("", f"file://{path.resolve()}").partition("=")
    return f"hydra.searchpath=[{text}]"


@dataclass(frozen=True)
class Validated:
    """A command line that may run: its plan, what runs a cell, and the sweeper that launches it (None of one run)."""

    plan: Plan
    runner: CellRunner
    sweeper: CellSweeper | None

    def start(self, context: HydraContext) -> Sequence[CellEntry | None]:
        """Run the single cell here, or hand the cells to Hydra's launcher; returns what became of them."""
        if self.sweeper is not None:
            return self.sweeper.launch(self.plan)
        (cell,) = self.plan.cells
        job = run_job(
            task_function=lambda _: self.runner(cell),
            config=self.plan.config,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
            hydra_context=context,
        )
        return [job.return_value]  # raises what the job has raised


def validate_command_line(command: CommandLine, context: HydraContext) -> Validated:
    """Compose and validate every cell of a command line.

    Raises:
        ConfigError: a syntax error, unknown option, group or key, a value that is not allowed, several values without
            -m, a launcher that is not installed, cells that cannot be run together.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="provider=hydra.searchpath")  # a folder that is not there
            return _validated(command, context)
    except Exception as error:
        if isinstance(error, StarquantError) or not is_of_configuration(error):
            raise
        raise ConfigError(first_line(error, command.searched)) from None


def _validated(command: CommandLine, context: HydraContext) -> Validated:
    loader = context.config_loader
    overrides = parse_overrides(command.overrides, loader)
    groups = Groups(loader, command.searched)
    for override in overrides:
        validate_option(override, groups)
        if override.key_or_group.startswith("hydra.callbacks"):
            raise ConfigError(f"{override.key_or_group}: callbacks of Hydra are not called; allowed: none")
    runner = CellRunner()
    sweeper = sweeper_of(overrides, command.multirun, context, runner)
    if sweeper is not None:
        return Validated(sweeper.validate_cells(task_words(overrides)), runner, sweeper)
    return Validated(_single(overrides, groups, context), runner, None)


def _single(overrides: Sequence[Override], groups: Groups, context: HydraContext) -> Plan:
    for override in overrides:
        if override.is_sweep_override():
            key, _, value = (override.input_line or "").partition("=")
            text = override.key_or_group not in groups.names and "(" not in value
            hint = f", or quote it: {in_shell(key, value)}" if text else ""
            raise ConfigError(
                f"{override.key_or_group}: got several values, {key}={value}; add -m to run a sweep{hint}"
            )

    def compose(words: list[str]) -> DictConfig:
        return hydra.compose("config", overrides=[*words, *hydra_words(overrides)], return_hydra_config=True)

    composer = Composer(compose, groups, lambda words: parse_overrides(words, context.config_loader))
    words = task_words(overrides)
    cell = composer.cell(words)
    assert composer.first is not None
    plan = Plan(cells=(cell,), overrides=(tuple(words),), sweep=False, config=composer.first)
    validate_plan(plan)
    validate_launcher(plan)
    return plan


def plan_of(arguments: Sequence[str]) -> Plan | None:
    """Return the validated cells of a command line; None where it runs nothing (--help, --cfg); raises ConfigError."""
    command = parse_command_line(arguments)
    if command.answers:
        return None
    with opened() as context:
        plan = validate_command_line(command, context).plan
    return None if command.shows else plan


def answer(arguments: Sequence[str]) -> int:
    """Let Hydra answer; it reads the command line of its process, so that other words need one of their own."""
    if list(arguments) != sys.argv[1:]:
        return subprocess.run([sys.executable, "-c", ALONE, *arguments]).returncode
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):  # errors are raised, not printed
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_nothing)()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except Exception as error:
        if isinstance(error, StarquantError) or not is_of_configuration(error):
            raise
        raise ConfigError(first_line(error)) from None
    return 0


def _nothing(_: DictConfig) -> None:
    """Stand for a task where Hydra answers."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, which ends workers as well."""

    def terminated(*_: Any) -> None:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield
        return
    handler = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Validate, run, and return the exit code: 0 when every cell ended well, 1 when not, 2 after bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        rank = launched_rank()
    except StarquantError as error:
        show_error(error)
        return 2
    try:
        with ended_by_sigterm():
            command = parse_command_line(words)
            if not command.answers:
                with opened() as context:
                    validated = validate_command_line(command, context)
                    if not command.shows and validated.plan.benchmark is not None:
                        return measure(validated.plan)
                    if not command.shows:
                        return run(validated.plan, lambda: validated.start(context), validated.runner.command)
            return answer(words)
    except StarquantError as error:
        if not rank:  # of several processes the first one tells
            show_error(error)
        return 2
    except KeyboardInterrupt as error:
        print("interrupted: what is finished is kept, the same command goes on from there", file=sys.stderr)
        return 143 if error.args else 130
