"""From a task specification to lm-eval's task manager: the package's own tasks, the hub, or local files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lm_eval.tasks import TaskManager

from starquant.config.tasks import TasksSpec
from starquant.errors import ConfigError, nearest
from starquant.evaluation import offline

TASK_FOLDER = Path(__file__).with_name("tasks")
#: Of the test-beds' suites, whose misspelt names are the package's own, too.
OWN_PREFIXES = ("testbed_", "smol_")


def is_own(tasks: TasksSpec) -> bool:
    """Whether all tasks are the package's own (`tasks/FOLDER/NAME.yaml`), the test-beds' suites by their prefix."""
    own = {path.stem for path in TASK_FOLDER.glob("*/*.yaml")} - {*offline.LOCAL_TASKS}
    return all(name in own or name.startswith(OWN_PREFIXES) for name in tasks.names)


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
            offline.write_tasks(Path(tasks.data_dir), tasks.names, Path(temporary))
            manager = TaskManager(include_path=temporary, include_defaults=False)
        else:
            manager = TaskManager(include_path=str(TASK_FOLDER))
        for index, name in enumerate(tasks.names):
            if name not in manager.all_tasks:
                raise ConfigError(
                    f"tasks.names.{index}: lm-eval has no task '{name}'.{nearest(name, manager.all_tasks)}"
                )
        yield manager
