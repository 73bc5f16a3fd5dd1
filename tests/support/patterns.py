"""Published parameter names and shapes, listed as patterns over layers and experts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path


def shapes_of_patterns(path: Path) -> dict[str, tuple[int, ...]]:
    """Every name and shape that a listing stands for."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern in json.loads(path.read_text())["patterns"]:
        ranges = {key: range(pattern[key][0], pattern[key][1] + 1) for key in ("l", "e") if key in pattern}
        for numbers in itertools.product(*ranges.values()):
            shapes[pattern["name"].format(**dict(zip(ranges, numbers, strict=True)))] = tuple(pattern["shape"])
    return shapes
