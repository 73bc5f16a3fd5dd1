"""Where the shipped weights of the embedded models lie: seed_N, and FAMILY/seed_N of families other than LLaDA."""

from __future__ import annotations

from pathlib import Path

from starquant.errors import ConfigError

WEIGHTS = Path(__file__).with_name("weights")


def shipped_seeds(family: str = "llada") -> list[int]:
    """Return the seeds of the models of a family that are shipped."""
    return sorted(int(folder.name.removeprefix("seed_")) for folder in _folder(family).glob("seed_*"))


def weights_folder(seed: int, family: str = "llada") -> Path:
    """Return the checkpoint folder of an embedded model; raises ConfigError when that seed is not shipped."""
    folder = _folder(family) / f"seed_{seed}"
    if not folder.is_dir():
        allowed = ", ".join(map(str, shipped_seeds(family)))
        raise ConfigError(f"model.seed: got {seed}, allowed: {allowed} (the embedded models that are shipped)")
    return folder


def _folder(family: str) -> Path:
    return WEIGHTS if family == "llada" else WEIGHTS / family
