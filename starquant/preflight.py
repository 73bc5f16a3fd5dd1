"""What can be judged of a run's paths and consent before torch is imported."""

from __future__ import annotations

from pathlib import Path

from starquant.errors import CheckpointError, ConsentError, DataError, RecordError
from starquant.spec import RunSpec, TasksSpec
from starquant.testbed.shipped import weights_folder

EXECUTES_CODE = ("humaneval",)


def check_paths(spec: RunSpec) -> None:
    """Check that what is named exists and is of the right kind.

    Raises:
        StarquantError: an embedded model that is not shipped, a checkpoint or data folder that is not there, a
            results folder that is a file, model-written code without consent.
    """
    model, tasks = spec.model, spec.tasks
    if model.path is None:
        assert model.seed is not None
        weights_folder(model.seed)
    else:
        path = Path(model.path).expanduser()
        if path.is_file():
            raise CheckpointError(f"model.path: {path}: is a file; a checkpoint is a folder")
        if model.path.startswith(("/", ".", "~")) and not path.exists():
            raise CheckpointError(f"model.path: {path}: no such checkpoint folder")
    if tasks.data_dir is not None and not Path(tasks.data_dir).is_dir():
        raise DataError(f"tasks.data_dir: {tasks.data_dir}: no such folder")
    if Path(spec.paths.results).is_file():
        raise RecordError(f"paths.results: {spec.paths.results}: cannot be written: it is a file")
    check_consent(tasks)


def check_results(spec: RunSpec) -> None:
    """Check once, before any cell of a sweep is run, that results can be written.

    Raises:
        RecordError: they cannot.
    """
    from starquant.records.store import RecordStore

    RecordStore(Path(spec.paths.results)).prepare()


def check_consent(tasks: TasksSpec) -> None:
    """Raise ConsentError when a task runs model-written programs and the user has not agreed."""
    risky = [name for name in tasks.names if name in EXECUTES_CODE]
    if risky and not tasks.allow_code_execution:
        raise ConsentError(
            f"tasks.allow_code_execution: {', '.join(risky)} runs programs that the model writes, in a separate "
            "process with time, memory and file limits; got false, set tasks.allow_code_execution=true to agree"
        )
