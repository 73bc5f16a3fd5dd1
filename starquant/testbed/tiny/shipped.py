"""Where the shipped weights of the embedded model lie."""

from __future__ import annotations

from pathlib import Path

from starquant.errors import ConfigError

WEIGHTS = Path(__file__).with_name("weights")


def shipped_seeds() -> list[int]:
    """Return the seeds of the models that are shipped."""
    return sorted(int(folder.name.removeprefix("seed_")) for folder in WEIGHTS.glob("seed_*"))


def weights_folder(seed: int) -> Path:
    """Return the checkpoint folder of an embedded model; raises ConfigError when that seed is not shipped."""
    folder = WEIGHTS / f"seed_{seed}"
    if not folder.is_dir():
        allowed = ", ".join(map(str, shipped_seeds()))
        raise ConfigError(f"model.seed: got {seed}, allowed: {allowed} (the embedded models that are shipped)")
    return folder
