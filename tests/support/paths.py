"""Where things lie, and the reference outputs beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "starquant"
GOLDEN = REPOSITORY / "tests" / "golden"
FAMILIES = ("llada_mha", "dream_gqa")


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """The reference outputs of one fixture (see tests/golden/README.md)."""
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return {key: arrays[key] for key in arrays}
