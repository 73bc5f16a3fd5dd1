"""Where a run's blocks are: all in memory, or on disk with one in memory at a time; judged by what the machine has."""

from __future__ import annotations

import logging
import math
import re
import shutil
import uuid
from pathlib import Path

import psutil
import torch
from filelock import FileLock

from starquant.config.run import RunSpec
from starquant.errors import ConfigError, RecordError
from starquant.models.checkpoint import Checkpoint
from starquant.models.validation import DTYPES
from starquant.store.locks import is_held, lock_path

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
    free = free_bytes(device)
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
    blocks = {number for name in checkpoint.shapes for number in re.findall(r"\.(\d+)\.", name)[:1]}
    return WORK * _parameters(checkpoint) // max(1, len(blocks))


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(shape) for shape in checkpoint.shapes.values())


def free_bytes(device: str) -> int:
    """Return the free memory of a device."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


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


class Scratch:
    """A folder below the results that goes with the run; what killed runs left is removed when one is made.

    Raises:
        RecordError: it cannot be made.
    """

    def __init__(self, results: Path) -> None:
        parent = results / "unfinished"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for left in parent.glob("blocks-*"):
                if not is_held(lock_path(results, "blocks", left.name)):
                    shutil.rmtree(left, ignore_errors=True)
                    lock_path(results, "blocks", left.name).unlink(missing_ok=True)
            self.folder = parent / f"blocks-{uuid.uuid4().hex[:12]}"
            self._lock = FileLock(lock_path(results, "blocks", self.folder.name))
            Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            self.folder.mkdir()
        except OSError as error:
            raise RecordError(f"{parent}: cannot be written: {error.strerror or error}") from error

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
