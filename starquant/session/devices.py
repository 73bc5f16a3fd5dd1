"""Which device a run gets: the one asked for, or any GPU that no other run on this machine has leased."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from starquant.errors import ConfigError

log = logging.getLogger(__name__)

FREE = "cuda:free"
POLL_S = 2.0


@contextmanager
def leased(device: str, count: int | None = None) -> Iterator[str]:
    """Yield a torch device; for "cuda:free" a whole GPU, waited for, and given back in the end (or by being killed).

    Args:
        device: a torch device, or "cuda:free".
        count: of GPUs; None asks torch.

    Raises:
        ConfigError: "cuda:free" without a GPU.
    """
    if device != FREE:
        yield device
        return
    if count is None:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError("runtime.device: got 'cuda:free', but torch sees no GPU; allowed: cpu")
    folder = Path(tempfile.gettempdir()) / f"starquant-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")  # their numbers are of what is visible
    locks = [FileLock(folder / f"{visible}-{index}.lock") for index in range(count)]
    waiting = False
    while True:
        for index, lock in enumerate(locks):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            try:
                yield f"cuda:{index}"
            finally:
                lock.release()
            return
        if not waiting:
            log.info("waiting: all %d GPUs are leased by other runs", count)
            waiting = True
        time.sleep(POLL_S)
