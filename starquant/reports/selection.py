"""Runs for a table: read from records, chosen by configuration keys, refused where they do not go together."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from starquant.config.speed import SpeedSpec
from starquant.errors import RecordError, show_error
from starquant.reports.choice import TASKS, Rank, conflict, differences, first_of, unranked
from starquant.reports.run import Run
from starquant.reports.seeds import seeds_of
from starquant.store.items import is_fidelity
from starquant.store.source import record_paths

#: What `--allow` may name, and what it lets through.
ALLOWED = {
    "dirty": "records of code that was not committed",
    "versions": "one task in several versions or few-shot numbers",
    "protocols": "one task under several protocols",
    "items": "one task on several sets of items",
}


def read_runs(folder: Path) -> list[Run]:
    """Return all runs below a folder, in the order of their names.

    Raises:
        RecordError: no such folder; records that are not what was written or not the means of their items, a line each.
    """
    runs, faults = _read(folder)
    if faults:
        raise RecordError("\n".join(dict.fromkeys(faults)))
    return runs


def _read(folder: Path, names: Collection[str] | None = None) -> tuple[list[Run], list[str]]:
    """Return the runs below a folder (or of files of these names) that are sound, and what is wrong with others."""
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder of records")
    runs, faults = [], []
    with without_collection():
        for path in (path for path in record_paths(folder) if names is None or path.name in names):
            try:
                runs.append(Run.read(path))
            except RecordError as error:
                faults.append(str(error))
    return runs, faults


class Results:
    """The runs below a results folder, read when a table first asks for them, once for all tables.

    Records that are not what was written, or not the means of their items, are named on stderr and left out.

    Attributes:
        folder: of results.
        names: of the records' files that are read; None for all.
        faults: of the records that were left out, once `runs` has been read.
    """

    def __init__(self, folder: Path, names: Collection[str] | None = None) -> None:
        self.folder, self.names = folder, names
        self.faults: list[str] = []

    @classmethod
    def of(cls, results: Path | Results) -> Results:
        """Return the results of a folder, or these results."""
        return results if isinstance(results, Results) else cls(results)

    @cached_property
    def runs(self) -> list[Run]:
        """All runs that are what was written, in the order of their names; raises RecordError without a folder."""
        runs, self.faults = _read(self.folder, self.names)
        for fault, records in Counter(self.faults).items():  # that of a compact form is every record's
            left_out = "the record is" if records == 1 else f"{records} records are"
            show_error(RecordError(f"{fault}; {left_out} left out"))
        return runs

    @property
    def unsealed(self) -> int:
        """How many of the runs were written without a seal: whether they were changed since cannot be told."""
        return sum(run.record.seal is None for run in self.runs)

    def __str__(self) -> str:
        return str(self.folder)


@contextmanager
def without_collection() -> Iterator[None]:
    """Suspend the search for cycles, which takes longer than reading where millions of small objects are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def validate_speed(specs: Mapping[Path, dict[str, Any]]) -> None:
    """Judge the evaluations of runs that stand side by side.

    Raises:
        RecordError: some are approximate, and the others exact or approximate in another way.
    """
    first_paths: dict[str, Path] = {}
    for path, spec in specs.items():
        words = SpeedSpec.model_validate(spec.get("speed") or {}).approximations
        first_paths.setdefault(", ".join(words) or "exact", path)
    if len(first_paths) > 1:
        (one, first), (other, second), *_ = first_paths.items()
        raise RecordError(
            f"speed (approximations): {one} in {first.name}, {other} in {second.name}; they are never mixed"
        )


def validate_together(runs: Sequence[Run], allow: Sequence[str] = ()) -> None:
    """Judge the runs of one table.

    Raises:
        RecordError: dirty records, task versions, protocols or items that differ, unless allowed; limits or
            approximations of the evaluation that differ.
    """
    if "dirty" not in allow:
        dirty = [run for run in runs if run.record.provenance.get("git_dirty") is not False]
        if dirty:
            raise RecordError(
                f"{len(dirty)} of {len(runs)} records are of code that was not committed, the first "
                f"{dirty[0].path.name}; --allow dirty takes them"
            )
    validate_speed({run.path: run.record.spec for run in runs})
    seen: dict[tuple[str, str, str], tuple[object, Run]] = {}

    def same(kind: str, model: str, what: str, value: object, run: Run) -> None:
        expected, first = seen.setdefault((kind, model, what), (value, run))
        if expected != value and kind not in allow:
            way = f"; --allow {kind} mixes them" if kind in ALLOWED else ""
            raise RecordError(f"{what}: {expected} in {first.path.name}, {value} in {run.path.name}{way}")

    for run in runs:
        model = str(run.get("model.name"))
        same("limits", model, "tasks.limit", run.get("tasks.limit"), run)
        for score in run.record.scores:
            what = f"{score.task} (version, few-shot)"
            same("versions", model, what, (score.task_version, score.num_fewshot), run)
        for task in run.get("tasks.names"):
            same("protocols", model, f"model.protocol.{task}", (run.get("model.protocol") or {}).get(task), run)
        for what, digest in run.documents.items():
            same("items", model, what, digest, run)


def one_a_seed(label: str, runs: Sequence[Run], rank: Rank = unranked) -> dict[tuple[Any, ...], Run]:
    """Return a row's runs by their seeds, in the order of these.

    Runs of one experiment and equal scores are one, whatever they say of what changes no figure; so are runs that
    differ in their tasks only: of other tasks each, or one of all that the other scored or left out.

    Of other runs the one of the higher rank is taken; a line on stderr says so.

    Raises:
        RecordError: two runs of the same seeds and rank; the message names the keys that differ, and a way to choose.
    """
    runs_by_seed: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        seeds = seeds_of(run)
        other = runs_by_seed.setdefault(seeds, run)
        if other is not run:
            differ = differences(other, run)
            both = _as_one(other, run) if {*differ} <= TASKS else None
            both = both or first_of(label, other, run, rank)
            if both is None:
                raise RecordError(
                    f"{label}: {other.path.name} and {run.path.name} are both its records; "
                    + conflict(other, run, differ)
                )
            runs_by_seed[seeds] = both
    order = sorted(runs_by_seed, key=lambda seeds: [-1 if seed is None else seed for seed in seeds])
    return {seeds: runs_by_seed[seeds] for seeds in order}


def _as_one(a: Run, b: Run) -> Run | None:
    """Return two runs that differ in their tasks at most as one, None where they do not go together."""
    tasks = {*a.get("tasks.names")}, {*b.get("tasks.names")}
    if all(tasks) and not tasks[0] & tasks[1]:
        return _joined(a, b)  # jobs of their own for each task
    for (less, fewer), (more, all_of_them) in (((b, tasks[1]), (a, tasks[0])), ((a, tasks[0]), (b, tasks[1]))):
        added = all_of_them - fewer
        consented = bool(added) and added <= {*less.left_out}  # consent was given later
        if fewer <= all_of_them and (consented or _alike(less, more)):
            return more
    return None


def _alike(less: Run, more: Run) -> bool:
    """Return whether a run has every score of another, to the last digit."""
    scores = {(s.task, s.metric, s.filter): (s.value, s.n, s.task_version) for s in more.record.scores}
    return all(scores.get((s.task, s.metric, s.filter)) == (s.value, s.n, s.task_version) for s in less.record.scores)


def _joined(a: Run, b: Run) -> Run:
    """Return two runs of different tasks as one; fidelity is the first one's."""
    tasks = a.get("tasks.names") + b.get("tasks.names")
    left_out = {task: why for task, why in (a.left_out | b.left_out).items() if task not in tasks}
    spec = a.record.spec | {"tasks": a.record.spec["tasks"] | {"names": tasks, "left_out": left_out or None}}
    scores = a.record.scores + [score for score in b.record.scores if not is_fidelity(score.task)]
    both = Run(a.path, a.record.model_copy(update={"spec": spec, "scores": scores}))
    both.__dict__["items"] = {name: columns for name, columns in b.items.items() if not is_fidelity(name)} | a.items
    return both
