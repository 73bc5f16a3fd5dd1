"""Hydra's launchers, judged before they start: what they need of the machine, and how much they are told to take."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from starquant.errors import ConfigError
from starquant.sweeps.cells import Plan

#: Setting of a launcher, wherever it stands in it -> the least and the most of it.
BOUNDS = {
    "n_jobs": (1, 1024),
    "num_cpus": (0, 65_536),
    "num_gpus": (0, 65_536),
    "nodes": (1, 65_536),
    "tasks_per_node": (1, 1024),
    "cpus_per_task": (1, 1024),
    "gpus_per_node": (0, 1024),
    "gpus_per_task": (0, 1024),
    "array_parallelism": (1, 65_536),
    "timeout_min": (1, 1_000_000),
    "mem_gb": (1, 1_000_000),
}


def validate_launcher(plan: Plan) -> None:
    """Judge how a sweep is to be started.

    Raises:
        ConfigError: a number of processes that is none, a working folder for each job.
    """
    settings = plan.config.hydra
    if settings.job.chdir:
        raise ConfigError("hydra.job.chdir: got true, but paths are of the folder of the command; allowed: false")
    if not plan.sweep:
        return
    size = settings.sweeper.get("max_batch_size")
    if size is not None and (type(size) is not int or size < 1):
        raise ConfigError(f"hydra.sweeper.max_batch_size: got {size!r}, allowed: null, or a whole number from 1")
    for key, name, value in _numbers(settings.launcher, "hydra.launcher"):
        least, most = BOUNDS[name]
        if name == "n_jobs" and value == -1:  # joblib's word for all cores
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise ConfigError(f"{key}: got {value!r}, allowed: {least} to {most}")


def validate_machine(plan: Plan) -> None:
    """Refuse a Slurm launcher on a machine without Slurm; raises ConfigError."""
    if "slurm" in str(plan.config.hydra.launcher.get("_target_", "")).lower() and shutil.which("srun") is None:
        raise ConfigError(
            f"launcher: got '{plan.launcher}', which needs Slurm's srun, and this machine has none; allowed: basic, "
            "joblib, submitit_local, ray, or a machine of the cluster"
        )


def _numbers(settings: DictConfig, where: str) -> Iterator[tuple[str, str, object]]:
    """Yield key, name and value of the settings that `BOUNDS` names, but for those that are null."""
    for name in map(str, settings):
        key, value = f"{where}.{name}", settings[name]
        if OmegaConf.is_dict(value):
            yield from _numbers(value, key)
        elif name in BOUNDS and value is not None:
            yield key, name, value
