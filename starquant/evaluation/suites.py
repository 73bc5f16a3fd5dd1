"""From a task specification to lm-eval's task manager: the package's own tasks, the hub, or local files."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from starquant.config.tasks import SHIPPED, TasksSpec
from starquant.errors import ConfigError, DataError, nearest
from starquant.evaluation import offline
from starquant.models.hub import cache_fault

TASK_FOLDER = Path(__file__).with_name("tasks")


def is_own(tasks: TasksSpec) -> bool:
    """Whether all tasks are the package's own (`tasks/FOLDER/NAME.yaml`), the test-beds' suites by their prefix."""
    own = {path.stem for path in TASK_FOLDER.glob("*/*.yaml")} - {*offline.LOCAL_TASKS}
    return all(name in own or name.startswith(SHIPPED) for name in tasks.names)


def is_of_hub(tasks: TasksSpec) -> bool:
    """Whether items are read through the hub or its cache here: nothing of the specification tells their content."""
    return tasks.data_dir is None and bool(tasks.names) and not is_own(tasks)


def validate_tasks(
    tasks: TasksSpec, processes: int = 1, shots: Mapping[str, int | None] | None = None
) -> dict[str, str]:
    """Load every task before the first one is scored.

    Args:
        tasks: to be scored.
        processes: that share the items of each.
        shots: examples in front of an item, by task; what is missing or None leaves lm-eval's number.

    Returns:
        Leaf task to a digest of its items and of what examples are taken from, of tasks that `is_of_hub`; else nothing.

    Raises:
        ConfigError: a name lm-eval does not know, fewer items than processes.
        DataError: items that cannot be read: no hub, a data set that is gone.
    """
    digests = {}
    with task_manager(tasks) as manager:
        for name in tasks.names:
            for leaf, task in _loaded(manager, name, tasks).items():
                count = min(len(task.eval_docs), tasks.limit or len(task.eval_docs))
                if count < processes:
                    raise ConfigError(
                        f"tasks.limit: {leaf} has {count} items to share, got {processes} processes; allowed: at most "
                        f"{count} processes"
                    )
                if is_of_hub(tasks):
                    digests[leaf] = digest_of_documents(task, count, (shots or {}).get(name))
    return digests


def digest_of_documents(task: Any, count: int, shots: int | None = None) -> str:
    """Return a digest of what a loaded task reads.

    Args:
        task: of lm-eval.
        count: of its items, the first ones.
        shots: examples in front of each, None for the task's own number; without any nothing else is read.
    """
    digest = hashlib.sha256()

    def add(document: Any) -> None:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")

    for document in islice(task.eval_docs, count):
        add(document)
    if task.config.num_fewshot if shots is None else shots:
        digest.update(b"examples\n")
        for document in task.fewshot_docs():
            add(document)
    return digest.hexdigest()[:16]


def _loaded(manager: TaskManager, name: str, tasks: TasksSpec) -> dict[str, Any]:
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:  # offline, gone, gated, a cache that cannot be written: lm-eval and datasets have many
        if is_own(tasks):
            raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            f"tasks.names: the items of {name} cannot be read ({type(error).__name__}: {reason}); allowed: a hub or "
            f"cache (HF_HOME) that can be used, or local files, tasks.data_dir=DIR{cache_fault()}"
        ) from error


@contextmanager
def task_manager(tasks: TasksSpec) -> Iterator[TaskManager]:
    """Yield a manager that knows the tasks, under their stock names.

    Raises:
        ConfigError: a name lm-eval does not know.
    """
    with tempfile.TemporaryDirectory(prefix="starquant-tasks-") as temporary:
        if is_own(tasks):  # without lm-eval's own, which take seconds to list
            manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False)
        elif tasks.data_dir is not None:
            offline.write_tasks(Path(tasks.data_dir), tasks.names, Path(temporary), tasks.data_fingerprint)
            manager = TaskManager(include_path=temporary, include_defaults=False)
        else:
            manager = TaskManager(include_path=str(TASK_FOLDER))
        for index, name in enumerate(tasks.names):
            if name not in manager.all_tasks:
                raise ConfigError(
                    f"tasks.names.{index}: lm-eval has no task '{name}'.{nearest(name, manager.all_tasks)}"
                )
        yield manager


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Hide lm-eval's and datasets' chatter; errors stay visible."""
    if verbose:
        yield
        return
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
