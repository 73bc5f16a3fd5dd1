"""`python run.py model=llada bits=w4a4`, `python -m starquant run -m bits=w8a8,w4a4`: from words to an exit code.

A command line is parsed, composed and validated before torch is imported. A single run is a job of its own; a sweep
goes through the sweeper to Hydra's launchers.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.override_parser.types import Override
from hydra.core.utils import env_override, run_job
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig

from starquant.errors import ConfigError, StarquantError, nearest
from starquant.runs.preflight import validate_results
from starquant.session.processes import launched_rank
from starquant.session.terminal import interactive
from starquant.sweeps.cell_log import CellEntry, CellLog
from starquant.sweeps.cells import Plan, left_out_of, validate_plan
from starquant.sweeps.composition import Composer
from starquant.sweeps.jobs import PARENT, CellRunner, forecast_cells
from starquant.sweeps.overrides import CONF, Groups, hydra_words, parse_overrides, task_words, validate_option
from starquant.sweeps.progress import SweepBar, summary
from starquant.sweeps.sweeper import CellSweeper, opened, sweeper_of

RUN = Path(__file__).resolve().parents[2] / "run.py"
LAUNCHERS = ("hydra", "omegaconf", "joblib", "submitit", "ray")


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


def _searched(folder: str) -> str:
    """Return --config-dir as the override that jobs compose with."""
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir: {folder}: no such folder")
    return f'hydra.searchpath=["file://{Path(folder).resolve()}"]'


@dataclass(frozen=True)
class Validated:
    """A command line that may run: its plan, and the sweeper that launches it (None of a single run)."""

    plan: Plan
    sweeper: CellSweeper | None

    def start(self, context: HydraContext) -> None:
        """Run the single cell here, or hand the cells to Hydra's launcher."""
        if self.sweeper is not None:
            self.sweeper.launch(self.plan)
            return
        (cell,) = self.plan.cells
        job = run_job(
            task_function=lambda _: CellRunner()(cell),
            config=self.plan.config,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
            hydra_context=context,
        )
        _ = job.return_value  # raises what the job has raised


def validate_command_line(command: CommandLine, context: HydraContext) -> Validated:
    """Compose and validate every cell of a command line.

    Raises:
        ConfigError: a syntax error, unknown option, group or key, a value that is not allowed, several values without
            -m, a launcher that is not installed, cells that cannot be run together.
    """
    loader = context.config_loader
    overrides = parse_overrides(command.overrides, loader)
    groups = Groups(loader, [word for word in command.overrides if word.startswith("hydra.searchpath=")])
    for override in overrides:
        validate_option(override, groups)
        if override.key_or_group.startswith("hydra.callbacks"):
            raise ConfigError(f"{override.key_or_group}: callbacks of Hydra are not called; allowed: none")
    sweeper = sweeper_of(overrides, command.multirun, context, CellRunner())
    if sweeper is not None:
        return Validated(sweeper.validate_cells(task_words(overrides)), sweeper)
    return Validated(_single(overrides, groups, context), None)


def _single(overrides: Sequence[Override], groups: Groups, context: HydraContext) -> Plan:
    for override in overrides:
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.key_or_group}: got several values, {override.input_line}; add -m to run a sweep"
            )

    def compose(words: list[str]) -> DictConfig:
        return hydra.compose("config", overrides=[*words, *hydra_words(overrides)], return_hydra_config=True)

    composer = Composer(compose, groups, lambda words: parse_overrides(words, context.config_loader))
    words = task_words(overrides)
    cell = composer.cell(words)
    assert composer.first is not None
    plan = Plan(cells=(cell,), overrides=(tuple(words),), sweep=False, config=composer.first)
    validate_plan(plan)
    return plan


def plan_of(arguments: Sequence[str]) -> Plan | None:
    """Return the validated cells of a command line; None where it runs nothing (--help, --cfg); raises ConfigError."""
    command = parse_command_line(arguments)
    if command.answers:
        return None
    with opened() as context:
        plan = validate_command_line(command, context).plan
    return None if command.shows else plan


def run(validated: Validated, context: HydraContext) -> int:
    """Run what is validated; returns how many cells did not end well.

    Raises:
        ConsentError: a task that needs consent is named without it, or nothing else would be scored.
        RecordError: the results folder cannot be written.
    """
    plan = validated.plan
    left_out = left_out_of(plan)
    if not plan.cells[0].spec.dry_run:
        validate_results(plan.cells[0].spec)
    for task, why in left_out.items() if not launched_rank() else ():
        print(f"note: {task} is left out: it {why}", file=sys.stderr, flush=True)
    if plan.cells[0].spec.dry_run:
        return forecast_cells(plan.cells)
    log = CellLog(plan.results)
    environment = {}
    if plan.launcher != "basic":
        environment["TQDM_DISABLE"] = "1"  # bars of several processes would overwrite each other
    if plan.launcher.startswith("joblib"):
        environment[PARENT] = str(os.getpid())
    with env_override(environment), SweepBar(log, plan.cells, enabled=plan.sweep and interactive()):
        _start(lambda: validated.start(context), plan.launcher)
    if launched_rank():
        return 0
    entries: list[CellEntry] = [log.read(cell.key, cell.name) for cell in plan.cells]
    if plan.sweep:
        print(summary(entries), file=sys.stderr, flush=True)
    failed = sum(entry.state != "done" for entry in entries)
    if plan.experiment is not None and not failed:
        from starquant.reports.experiments import after_sweep

        after_sweep(plan.experiment, plan.results)
    return failed


def _start(start: Callable[[], None], launcher: str) -> None:
    try:
        start()
    except StarquantError:
        raise
    except Exception as error:  # of the launcher: its settings, or a worker that was killed
        if launched_rank() is not None:
            raise
        if type(error).__module__.split(".")[0] not in LAUNCHERS:
            traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        print(f"error: launcher={launcher}: {type(error).__name__}: {first}", file=sys.stderr, flush=True)


def answer(arguments: Sequence[str]) -> int:
    """Let Hydra answer; it reads the command line of its process, so that other words need one of their own."""
    if list(arguments) != sys.argv[1:]:
        return subprocess.run([sys.executable, str(RUN), *arguments]).returncode
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):  # errors are raised, not printed
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_nothing)()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
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
        with ended_by_sigterm():
            command = parse_command_line(words)
            if not command.answers:
                with opened() as context:
                    validated = validate_command_line(command, context)
                    if not command.shows:
                        return 1 if run(validated, context) else 0
            return answer(words)
    except StarquantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except HydraException as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("interrupted: what is finished is kept, the same command goes on from there", file=sys.stderr)
        return 143 if error.args else 130
