"""A sweeper for Hydra: every cell is validated before the first one runs, then Hydra's launcher has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from starquant.errors import ConfigError, RecordError
from starquant.sweeps.cells import Cell, Plan, validate_folders, validate_plan
from starquant.sweeps.composition import Composer, contained_groups, varied_keys
from starquant.sweeps.faults import Faults
from starquant.sweeps.launchers import validate_launcher
from starquant.sweeps.overrides import (
    CONF,
    Groups,
    expand,
    hydra_words,
    options_of,
    parse_overrides,
    task_words,
    validate_option,
)


@dataclass(frozen=True)
class Jobs:
    """The task function of a launcher: each job takes its cell, as it was validated, by the job's number.

    Hydra's launchers compose a job's configuration once more by themselves; nothing of it is read but the number.
    """

    cells: tuple[Cell, ...]
    task: Callable[[Cell], Any]

    def __call__(self, _: DictConfig) -> Any:
        """Run the job's cell."""
        return self.task(self.cells[HydraConfig.get().job.num])


class CellSweeper(Sweeper):
    """Enumerates, validates and launches the cells of a sweep.

    Args:
        params: swept by an experiment; the command line wins over them.
        parts: further keys and values, list by list: the sweep is every list's cells (`divided`).
        max_batch_size: cells that a launcher gets at once, None for all.
    """

    def __init__(
        self,
        params: DictConfig | None = None,
        parts: ListConfig | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        self._params, self._parts, self.max_batch_size = params, parts, max_batch_size

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives; the task function gets a `Cell` in place of a configuration."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Validate every cell that `arguments` stand for, then launch them; raises ConfigError."""
        return self.launch(self.validate_cells(arguments))

    def validate_cells(self, arguments: Sequence[str]) -> Plan:
        """Enumerate, compose and validate the cells, each once.

        Raises:
            ConfigError: an unknown option or key, a value that is not allowed, a sweep of no cells, cells that cannot
                be run together.
        """
        loader, config = self._context.config_loader, self._config
        groups = Groups(loader, config.hydra.overrides.hydra)
        own, first = parse_overrides(arguments, loader), None
        swept = _swept_of(self._params, self._parts)
        cells: dict[str, tuple[Cell, tuple[str, ...]]] = {}
        folders, faults = [], Faults()
        for params, said in divided(swept, own):
            overrides = [*self._swept(params, said), *said]
            for override in overrides:
                validate_option(override, groups)
            overrides = [override for override in overrides if not override.is_hydra_override()]
            composer = Composer(
                compose=lambda words: loader.load_sweep_config(config, words),
                groups=groups,
                parse=lambda words: parse_overrides(words, loader),
                varied=varied_keys(overrides, groups),
                contained=contained_groups(overrides, groups),
            )
            for words in expand(overrides):
                with faults.of_a_cell():
                    cell = composer.cell(words)
                    known, _ = cells.setdefault(cell.key, (cell, tuple(words)))
                    _validate_exports(known, cell)
                    folders.append(cell.spec.paths.results)
            first = first or composer.first
        faults.validate()
        if first is None:
            raise ConfigError("the sweep has no cells: one of its keys has no value")
        validate_folders(folders)
        plan = Plan(
            cells=tuple(cell for cell, _ in cells.values()),
            overrides=tuple(words for _, words in cells.values()),
            sweep=True,
            config=first,
        )
        validate_plan(plan)
        validate_launcher(plan)
        return plan

    def _swept(self, params: Mapping[str, Any], own: Sequence[Override]) -> list[Override]:
        """Return parameters of an experiment without what the command line says in another spelling (`++key=`)."""
        spelled = {o.key_or_group: o.get_key_element() for o in own}
        words = [f"{key}={option}" for key, option in params.items() if spelled.get(key, key) == key]
        return parse_overrides(words, self._context.config_loader)

    def launch(self, plan: Plan) -> list[Any]:
        """Hand the cells to Hydra's launcher; returns what it returns, raises what a job could not keep to itself."""
        self._name_folder(plan)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=Jobs(plan.cells, self._task), config=plan.config
        )
        size = self.max_batch_size or len(plan.cells)
        returned = []
        for start in range(0, len(plan.cells), size):
            jobs = launcher.launch(plan.overrides[start : start + size], initial_job_idx=start)
            returned += [job.return_value for job in jobs]
        return returned

    def _name_folder(self, plan: Plan) -> None:
        """Name the launcher's folder by the cells, unless the command line names it, and keep the words there."""
        settings = plan.config.hydra
        if not any(word.startswith("hydra.sweep.dir=") for word in settings.overrides.hydra):
            name = QuotedString(str(plan.results / "sweeps" / plan.name), Quote.single)
            settings.sweep.dir = name.text
            settings.overrides.hydra.append(f"hydra.sweep.dir={name.with_quotes()}")  # jobs compose from these
        folder = Path(settings.sweep.dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self._config, folder / "multirun.yaml")
        except OSError as error:
            raise RecordError(f"hydra.sweep.dir: {folder}: cannot be written: {error.strerror or error}") from error


def _validate_exports(first: Cell, second: Cell) -> None:
    """Refuse cells that are one run but for what they export, of which one would be left out; raises ConfigError."""
    if first.spec.export != second.spec.export:
        one, other = (f"{cell.spec.export.dir} ({cell.spec.export.format})" for cell in (first, second))
        raise ConfigError(
            f"export: got {one} and {other} for one run of a sweep; allowed: one for each; export the other by a "
            "command of its own, nothing is computed again"
        )


def _swept_of(params: object, parts: object) -> list[dict[str, Any]]:
    """Return the keys and values of each part of an experiment; raises ConfigError for what is no such thing."""
    shared, several = {} if params is None else params, [{}] if parts is None else parts
    if not isinstance(shared, dict | DictConfig):
        raise ConfigError(f"hydra.sweeper.params: got {shared!r}, allowed: KEY: VALUES")
    if not isinstance(several, list | ListConfig) or not all(isinstance(part, dict | DictConfig) for part in several):
        raise ConfigError(f"hydra.sweeper.parts: got {several!r}, allowed: a list of KEY: VALUES")
    own = {str(key): shared[key] for key in shared}
    return [own | {str(key): part[key] for key in part} for part in several]


def divided(
    parts: Sequence[Mapping[str, Any]], own: Sequence[Override]
) -> Iterator[tuple[Mapping[str, Any], list[Override]]]:
    """Yield (parameters of a part, words of the command line that go with it).

    The command line wins over every part, but for a group that a part has keys below of: of the options chosen there a
    part takes those that it lists, and options that no part lists go without any of these keys.
    """
    deep = {key.split(".")[0] for part in parts for key in part if "." in key} & {key for part in parts for key in part}
    chosen = {o.key_or_group: list(map(str, options_of(o))) for o in own if o.key_or_group in deep}
    rest = [o for o in own if o.key_or_group not in chosen]
    if not chosen:
        yield from ((part, rest) for part in parts)
        return
    listed: dict[str, set[str]] = {key: set() for key in chosen}
    for part in parts:
        kept = {key: [o for o in options if o in str(part.get(key)).split(",")] for key, options in chosen.items()}
        for key, options in kept.items():
            listed[key] |= {*options}
        if all(kept.values()):
            yield {**part, **{key: ",".join(options) for key, options in kept.items()}}, rest
    for key, options in chosen.items():
        if any(option not in listed[key] for option in options):
            shared = {
                k: v for k, v in parts[0].items() if k.split(".")[0] not in deep and all(p.get(k) == v for p in parts)
            }
            others = [o for o in own if o.key_or_group != key]
            yield {**shared, key: ",".join(o for o in options if o not in listed[key])}, others


@contextmanager
def opened() -> Iterator[HydraContext]:
    """Initialize Hydra on conf/."""
    with hydra.initialize_config_dir(str(CONF), job_name="run", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield HydraContext(loader, Callback())  # type: ignore[arg-type]  # the declared class is private to Hydra


def sweeper_of(
    overrides: Sequence[Override], multirun: bool, context: HydraContext, task: Callable[[Cell], Any]
) -> CellSweeper | None:
    """Return the sweeper of a command line; None of a single run.

    A sweep has `-m`, or an experiment whose YAML says `hydra.mode: MULTIRUN`.
    """
    settled = hydra_words(overrides)
    chosen = [o.input_line or "" for o in overrides if o.key_or_group in ("experiment", "launcher")]
    may_sweep = any(o.key_or_group in ("experiment", "hydra.mode") for o in overrides)
    if multirun:
        settled = [word for word in settled if not word.startswith("hydra.mode=")] + ["hydra.mode=MULTIRUN"]
    elif not may_sweep:
        return None
    config = hydra.compose("config", overrides=[*settled, *chosen], return_hydra_config=True)
    if config.hydra.mode != RunMode.MULTIRUN:
        return None
    with open_dict(config.hydra):
        config.hydra.overrides.task = task_words(overrides)
    sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=task, config=config)
    if not isinstance(sweeper, CellSweeper):
        raise ConfigError(f"hydra/sweeper: got '{config.hydra.runtime.choices['hydra/sweeper']}', allowed: starquant")
    return sweeper
