"""Where a run's blocks are: all in memory, or on disk with one in memory at a time; judged by what the machine has."""

from __future__ import annotations

import logging
import math
import re
import shutil
from pathlib import Path

import torch

from starquant.config.run import RunSpec
from starquant.diffusion.batch_size import free_bytes
from starquant.errors import ConfigError
from starquant.models.checkpoint import Checkpoint
from starquant.models.validation import DTYPES

log = logging.getLogger(__name__)

#: Bytes beside the weights for every parameter of a block: it in float64, its statistics, its solver. Our choice.
WORK = 20


def on_disk(spec: RunSpec, checkpoint: Checkpoint, device: str) -> bool:
    """Return whether the blocks of a run stay on disk (`runtime.blocks`).

    Raises:
        ConfigError: more memory or disk than there is; blocks on disk of a packed checkpoint.
    """
    wanted, needed = spec.runtime.blocks, weight_bytes(spec, checkpoint) + work_bytes(checkpoint)
    if spec.is_packed:
        if wanted == "disk":
            raise ConfigError(
                "runtime.blocks: got disk, but a packed checkpoint is held in memory; allowed: memory, auto"
            )
        return False
    free = free_bytes(torch.device(device))
    if wanted == "memory" and needed > free:
        raise ConfigError(
            f"runtime.blocks: got memory, which needs {_gb(needed)} on {device}, where {_gb(free)} are free; "
            "allowed: disk, auto"
        )
    if wanted == "memory" or (wanted == "auto" and needed <= free):
        return False
    if spec.quantizes:
        _validate_disk(spec, weight_bytes(spec, checkpoint), wanted)
    if wanted == "auto":
        log.info("note: blocks stay on disk: in memory they need %s, %s are free on %s", _gb(needed), _gb(free), device)
    return True


def weight_bytes(spec: RunSpec, checkpoint: Checkpoint) -> int:
    """Return the bytes of all weights in the dtype they are computed with."""
    return _parameters(checkpoint) * DTYPES[spec.model.dtype].itemsize


def work_bytes(checkpoint: Checkpoint) -> int:
    """Return about how many bytes a block takes while it is calibrated and changed."""
    numbers = {name: re.search(r"\.(\d+)\.", name) for name in checkpoint.shapes}
    inside = {name: number[1] for name, number in numbers.items() if number is not None}
    parameters = sum(math.prod(checkpoint.shapes[name]) for name in inside)
    return WORK * parameters // max(1, len(set(inside.values())))


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(shape) for shape in checkpoint.shapes.values())


def _validate_disk(spec: RunSpec, needed: int, wanted: str) -> None:
    folder = Path(spec.paths.results)
    beside = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(beside).free
    if needed > free:
        raise ConfigError(
            f"runtime.blocks: got {wanted}, and quantized blocks on disk need {_gb(needed)} in {folder}, where "
            f"{_gb(free)} are free; allowed: memory, or another paths.results"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
