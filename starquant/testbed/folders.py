"""From a test-bed and a seed to a checkpoint folder. No torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from starquant.testbed.smol.cache import built_folder
from starquant.testbed.tiny.shipped import weights_folder

#: Test-bed -> what finds its checkpoints.
FOLDERS: dict[str, Callable[[int], Path]] = {
    "tiny": weights_folder,
    "tiny_sdar": partial(weights_folder, family="sdar"),
    "tiny_llada_moe": partial(weights_folder, family="llada_moe"),
    "smol": built_folder,
}


def testbed_folder(testbed: str, seed: int) -> Path:
    """Return the checkpoint folder of a test-bed's model.

    Raises:
        ConfigError: a seed that is not shipped, a checkpoint that has not been built.
    """
    return FOLDERS[testbed](seed)


def checkpoint_of(name: str) -> str:
    """Return the checkpoint folder that a test-bed's name stands for, any other name as it is; raises ConfigError."""
    return str(testbed_folder(name, 0)) if name in FOLDERS else name
