"""What can be judged of a run's paths and consent before torch is imported."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from starquant.config.gguf_bits import INSTALL, validate_gguf
from starquant.config.messages import LONGEST_SHOWN
from starquant.config.run import RunSpec
from starquant.config.tasks import EXECUTES_CODE, TasksSpec, validate_consent, validate_sandbox
from starquant.errors import CheckpointError, ConfigError, DataError, RecordError
from starquant.store.exports import exported_from, validate_target
from starquant.store.records import RecordStore
from starquant.testbed.folders import testbed_folder


def validate_paths(spec: RunSpec) -> None:
    """Judge whether what is named exists and is of the right kind.

    Raises:
        StarquantError: a path that is none, a test-bed's model that is not there, a checkpoint or data folder that is
            not there, a results folder that is a file, no task that may be scored without consent, a sandbox that does
            not hold.
    """
    _validate_reachable(spec)
    model, tasks = spec.model, spec.tasks
    if spec.is_gguf or model.engine == "llama_cpp":
        _validate_engine(spec)
    if model.source is None:
        assert model.seed is not None
        testbed_folder(model.testbed, model.seed)
    else:
        path, key = Path(model.source), "model.path" if model.engine == "torch" else "model.checkpoint"
        if path.is_file():
            raise CheckpointError(f"{key}: {path}: is a file; a checkpoint is a folder")
        if model.source.startswith(("/", ".", "~")) and not path.exists():
            raise CheckpointError(f"{key}: {path}: no such checkpoint folder")
    if tasks.data_dir is not None and not Path(tasks.data_dir).is_dir():
        raise DataError(f"tasks.data_dir: {tasks.data_dir}: no such folder")
    if Path(spec.paths.results).is_file():
        raise RecordError(f"paths.results: {spec.paths.results}: cannot be written: it is a file")
    if spec.is_scored:
        validate_consent(tasks.consented())
        _validate_sandbox(tasks.consented())
    validate_export(spec)


def _validate_engine(spec: RunSpec) -> None:
    """Raise where llama.cpp does not compute what is wanted, is not installed, or the file is not there."""
    path, engine, speed = Path(spec.model.path or ""), spec.model.engine, spec.speed
    if not spec.is_gguf or engine != "llama_cpp":
        raise ConfigError(
            f"method: got '{spec.method.name}' with model.engine={engine}, allowed: method=gguf with "
            "model.engine=llama_cpp, which computes a GGUF as it is; neither without the other"
        )
    if speed.compile or speed.kv_cache != "none":
        raise ConfigError("speed: model.engine=llama_cpp compiles nothing and keeps no cache; allowed: speed=exact")
    for package in ("gguf", "llama_cpp"):
        if find_spec(package) is None:
            raise ConfigError(f"model.engine: got llama_cpp, which needs the package {package}; {INSTALL}")
    if not path.is_file():
        raise CheckpointError(f"model.path: {path}: no such file")


def _validate_sandbox(tasks: TasksSpec) -> None:
    """Raise ConsentError where programs would run in a sandbox that does not hold, and nobody has agreed to that."""
    if not tasks.allow_weak_sandbox and any(name in EXECUTES_CODE for name in tasks.names):
        from starquant.evaluation.sandbox.protection import protection

        validate_sandbox(tasks.names, protection().missing(), tasks.allow_weak_sandbox)


def _validate_reachable(spec: RunSpec) -> None:
    """Refuse paths that cannot even be looked at: too long, in circles, where the user may not look."""
    paths = {
        "model.path": spec.model.path,
        "model.checkpoint": spec.model.checkpoint,
        "tasks.data_dir": spec.tasks.data_dir,
        "paths.results": spec.paths.results,
        "export.dir": spec.export.dir,
    }
    for name, source in (("calibration", spec.calibration.source), ("fidelity", spec.fidelity.source)):
        paths[f"{name}.source.path"] = None if source is None else source.path
    for key, path in paths.items():
        try:
            if path is not None:
                Path(path).exists()
        except OSError as error:
            shown = path if path is None or len(path) <= LONGEST_SHOWN else f"{path[:LONGEST_SHOWN]}..."
            raise ConfigError(f"{key}: {shown}: no usable path: {error.strerror or error}") from None


def validate_export(spec: RunSpec) -> None:
    """Judge what is to be exported and where.

    Raises:
        ConfigError: nothing that could be exported; a target that holds something else, or cannot be written.
    """
    if spec.export.dir is None:
        if spec.export.format == "gguf":
            raise ConfigError("export.format: got gguf without export.dir; allowed: export.dir=FILE.gguf")
        return
    target, results = Path(os.path.realpath(spec.export.dir)), Path(os.path.realpath(spec.paths.results))
    if results.is_relative_to(target):
        raise ConfigError(
            f"export.dir: got {spec.export.dir}, where the results go (paths.results={spec.paths.results}); allowed: a "
            "folder that holds nothing else"
        )
    if spec.export.format == "gguf":
        _validate_gguf_export(spec)
        return
    if spec.bits.in_blocks:
        raise ConfigError(
            f"export.format: got packed with bits={spec.bits.name}, whose blocks are llama.cpp's; allowed: gguf"
        )
    if not spec.canonical().quantizes or not spec.is_scored:
        bits = f" bits={spec.bits.name}" if spec.quantizes else ""
        raise ConfigError(
            f"export.dir: got method={spec.method.name}{bits} stage={spec.stage}, but a quantized model and its "
            "scores are what is exported; allowed: a method other than none and packed, stage=all or evaluate"
        )
    if (
        not spec.dry_run and exported_from(Path(spec.export.dir)) is None
    ):  # an earlier export may be this run's own: the run will see
        validate_target(Path(spec.export.dir))


def _validate_gguf_export(spec: RunSpec) -> None:
    """Judge what is to be written for llama.cpp; a file that is there already may be this run's own."""
    target = Path(spec.export.dir or "")
    if spec.is_packed or spec.is_gguf or not spec.is_scored:
        raise ConfigError(
            f"export.dir: got method={spec.method.name} stage={spec.stage} with export.format=gguf, allowed: a method "
            "that quantizes, or none; stage=all or evaluate"
        )
    if target.suffix != ".gguf" or target.is_dir():
        raise ConfigError(f"export.dir: got {target} with export.format=gguf, allowed: a file FILE.gguf")
    if find_spec("gguf") is None:
        raise ConfigError("export.format: got gguf, which needs the package gguf; pip install gguf")
    canonical = spec.canonical()
    validate_gguf(canonical.method, canonical.bits)
    if not spec.dry_run and not target.exists():
        validate_target(target)


def validate_results(spec: RunSpec) -> None:
    """Judge once, before any cell of a sweep is run, whether results can be written.

    Raises:
        RecordError: they cannot.
    """
    RecordStore(Path(spec.paths.results)).prepare()
