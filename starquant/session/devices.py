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
def leased(device: str) -> Iterator[str]:
    """Yield a torch device; for "cuda:free" a whole GPU, waited for, and given back in the end (or by being killed).

    Raises:
        ConfigError: "cuda:free" without a GPU.
    """
    if device != FREE:
        yield device
        return
    cards = _cards()
    if not cards:
        raise ConfigError("runtime.device: got 'cuda:free', but torch sees no GPU; allowed: cpu")
    folder = Path(tempfile.gettempdir()) / f"starquant-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    locks = [FileLock(folder / f"{card}.lock") for card in cards]
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
            log.info("waiting: all %d GPUs are leased by other runs", len(cards))
            waiting = True
        time.sleep(POLL_S)


def _cards() -> list[str]:
    """Return a name of every GPU that torch sees: the same one in every process, whatever else that sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    cards = []
    for index in range(torch.cuda.device_count()):
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)  # parts of one card may share it
        cards.append(f"{visible}-{index}" if uuid is None or "MIG-" in visible else str(uuid))
    return cards
