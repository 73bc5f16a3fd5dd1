"""Which records a table takes: conditions KEY=VALUE, limits; and what tells two records of one row apart."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from starquant.config.digest import inert_keys
from starquant.config.run import RunSpec
from starquant.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from starquant.reports.run import Run

Where = Mapping[str, Any]
Seeds = tuple[Any, ...]
#: Of two runs that compete for a row the one of the higher rank is taken.
Rank = Callable[["Run"], int]
LIMIT, GRID = "tasks.limit", "bits.grid"
#: What full precision does not have: these keys choose among the other runs only.
QUANTIZED_ONLY = ("bits", "method", "calibration", "fidelity")
#: Keys that say which tasks are scored; the files of these differ as they do.
TASKS = {"tasks.name", "tasks.names", "tasks.data_fingerprint"}
_EXPONENT = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")
#: Characters of a value that a hint shows.
_LONGEST = 100


def condition(text: str) -> tuple[str, Any]:
    """Return the key and value of KEY=VALUE; the value is YAML, or None.

    Raises:
        ConfigError: no such thing.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--where: got '{text}', allowed: KEY=VALUE, such as method.tac.block_size=16")
    try:
        return key, _value(value)
    except yaml.YAMLError:
        raise ConfigError(f"--where: got '{text}', whose value is not YAML") from None


def conditions(texts: Sequence[str]) -> dict[str, Any]:
    """Return what `--where` was given with; raises ConfigError for a key with two values."""
    where: dict[str, Any] = {}
    for text in texts:
        key, value = condition(text)
        if where.setdefault(key, value) != value:
            raise ConfigError(f"--where: {key}: got {where[key]!r} and {value!r}; allowed: one value a key")
    return where


def _value(text: str) -> Any:
    if text == "None":
        return None
    value = yaml.safe_load(text)
    return float(text) if isinstance(value, str) and _EXPONENT.fullmatch(text) else value  # YAML wants 1.0e-05


def in_words(key: str, value: Any) -> str:
    """Return a condition as a shell takes it."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        same = bool(text) and _value(text) == value
    except yaml.YAMLError:
        same = False
    return f"--where {shlex.quote(f'{key}={text if same else json.dumps(value)}')}"


def chosen(runs: Sequence[Run], where: Where) -> list[Run]:
    """Return the runs that have these values; a condition on a key of methods is of the runs that have that key."""
    return [run for run in runs if all(_matches(run, key, value) for key, value in where.items())]


def _matches(run: Run, key: str, value: Any) -> bool:
    room = key.split(".")[0]
    if room in QUANTIZED_ONLY and run.get("method.name") == "none":
        return True
    if room == "method" and not run.has(key) and value is not None:
        return True
    return run.agrees(key, value)


def taken(
    records: object,
    runs: Sequence[Run],
    where: Where,
    name: str = "the table",
    is_of_it: Callable[[Run], bool] = lambda run: True,
) -> list[Run]:
    """Return the runs of a table: those that `where` takes, without those of some items only unless it asks for them.

    Grids are not mixed: without `bits.grid` among the conditions, runs on the authors' grids stand for their methods
    where there are some. A line on stderr says how many are left out.

    Args:
        records: where they were read from, for messages.
        runs: all of them.
        where: dotted configuration keys and values.
        name: of the table.
        is_of_it: whether a run belongs to it.

    Raises:
        ConfigError: a value that no record has.
        RecordError: nothing but runs of some items.
    """
    for key, value in where.items():
        if runs and not any(run.agrees(key, value) for run in runs):
            raise ConfigError(f"{records}: no record has {key}={value} (--where)")
    own = _of_one_grid([run for run in chosen(runs, where) if is_of_it(run)], name)
    cut = [] if LIMIT in where else [run for run in own if run.get(LIMIT) is not None]
    if cut and len(cut) == len(own):
        raise RecordError(f"{records}: holds no record of {name} on all items; {_said_of(cut)}")
    if cut:
        print(f"note: {name}: {_said_of(cut)}", file=sys.stderr, flush=True)
    return own if LIMIT in where else [run for run in own if run.get(LIMIT) is None]


def _of_one_grid(runs: Sequence[Run], name: str) -> list[Run]:
    """Return runs without those on the common grid where others are on their authors', and say so on stderr."""
    grid = grid_of(runs)
    kept = [run for run in runs if run.grid in (None, grid)]
    if len(kept) < len(runs):
        few = f"{len(runs) - len(kept)} of {len(runs)} records"
        print(
            f"note: {name}: {few} on the common grid left out ({in_words(GRID, 'common')} takes those)", file=sys.stderr
        )
    return kept


def grid_of(runs: Sequence[Run]) -> str | None:
    """Return "authors" where a run is on its authors' grid, else "common" where one is; None where all have one."""
    grids = {run.grid for run in runs} - {None}
    return min(grids, default=None)  # type: ignore[type-var]


def _said_of(cut: Sequence[Run]) -> str:
    """Return how many runs scored some of the items only, and the conditions that take them."""
    limits = sorted({int(run.get(LIMIT)) for run in cut})
    ways = " or ".join(in_words(LIMIT, limit) for limit in limits[:3])
    records = "record" if len(cut) == 1 else "records"
    return f"{len(cut)} {records} with {LIMIT} left out ({ways} takes {'it' if len(cut) == 1 else 'those'})"


def differences(a: Run, b: Run) -> list[str]:
    """Return the dotted keys of what makes two runs two experiments; nothing that changes no figure is among them."""
    if a.record.digest == b.record.digest:
        return []
    specs = [json.loads(json.dumps(run.record.spec)) for run in (a, b)]
    try:
        identities = [RunSpec.from_config(spec).identity() for spec in specs]
    except ConfigError:  # of another version of this code
        identities = [_without(spec, [*inert_keys(RunSpec)]) for spec in specs]
    protocols = [identity.get("model", {}).get("protocol") or {} for identity in identities]
    for protocol in protocols:  # of tasks that one of them scored only
        for task in {*protocol} - {*protocols[0]} | {*protocol} - {*protocols[1]}:
            del protocol[task]
    return sorted(_differences(*json.loads(json.dumps(identities))))


def _without(spec: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    for key in keys:
        *parents, leaf = key.split(".")
        here: Any = spec
        for parent in parents:
            here = here.get(parent) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here.pop(leaf, None)
    return spec


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if a == b:
        return []
    sides = [{} if side is None else side for side in (a, b)]
    if (a is None and b is None) or not all(isinstance(side, dict) for side in sides):
        return [prefix[:-1]]
    return [
        d
        for key in {**sides[0], **sides[1]}
        for d in _differences(sides[0].get(key), sides[1].get(key), f"{prefix}{key}.")
    ]


def conflict(a: Run, b: Run, differ: Sequence[str]) -> str:
    """Return how two runs of one row differ, and what chooses one of them."""
    one_of_them = "give a folder with one of them"
    if not differ:
        values = [f"{x.task} {x.metric} ({x.value:.6g} and {y.value:.6g})" for x, y in _other_scores(a, b)]
        what = f"in {', '.join(values[:3])}" if values else "in nothing but items"
        return f"they are of one experiment and differ {what}; {one_of_them}"
    said = ", ".join(f"{key} ({_short(a.get(key))} and {_short(b.get(key))})" for key in differ[:3])
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    ways = [
        in_words(key, value)
        for key in differ
        for run, value in ((a, a.get(key)), (b, b.get(key)))
        if chosen([a, b], {key: value}) == [run] and len(json.dumps(value)) <= _LONGEST
    ]
    return f"they differ in {said}{more}; " + (
        f"choose by {' or '.join(ways[:2])}, or {one_of_them}" if ways else one_of_them
    )


def _other_scores(a: Run, b: Run) -> Iterator[tuple[Any, Any]]:
    others = {(score.task, score.metric, score.filter): score for score in b.record.scores}
    for score in a.record.scores:
        other = others.get((score.task, score.metric, score.filter))
        if other is not None and other.value != score.value:
            yield score, other


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def unranked(run: Run) -> int:
    """Return the same for every run."""
    return 0


def rank_of(experiment: str, made: Collection[str] = ()) -> Rank:
    """Return the rank of an experiment's table: first the records of a sweep that has ended, then all it ever made.

    Args:
        experiment: its name, which records carry.
        made: file names of the records that the sweep has made or used again.
    """
    return lambda run: 2 * (run.path.name in made) or int(run.get("experiment.name") == experiment)


def first_of(label: str, a: Run, b: Run, rank: Rank) -> Run | None:
    """Return the run of the higher rank, and say so on stderr; None where both have the same."""
    if rank(a) == rank(b):
        return None
    chosen_one, other = (a, b) if rank(a) > rank(b) else (b, a)
    keys = differences(a, b)
    said = ", ".join(f"{key} is {_short(chosen_one.get(key))}, not {_short(other.get(key))}" for key in keys[:3])
    names = f"{chosen_one.path.name}, made by the experiment, not {other.path.name}"
    print(f"note: {label}: {names}; {said}", file=sys.stderr, flush=True)
    return chosen_one


def of_most_tasks(label: str, runs: Mapping[Seeds, Run]) -> dict[Seeds, Run]:
    """Return a row's runs without those that scored some of the tasks of another one; a line on stderr counts these.

    The mean of a row is over the same runs in every column.
    """
    scored = {seeds: {*run.get("tasks.names")} for seeds, run in runs.items()}
    kept = {seeds: run for seeds, run in runs.items() if not any(scored[seeds] < other for other in scored.values())}
    if len(kept) < len(runs):
        few = f"{len(runs) - len(kept)} of {len(runs)} runs"
        print(f"note: {label}: {few} scored some of the tasks only and are left out", file=sys.stderr, flush=True)
    return kept
