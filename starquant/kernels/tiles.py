"""How a product is cut into tiles: measured settings of a GPU where there are any, else a rule.

`benchmarks/tiles.py` measures them and writes `tiles.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Tile:
    """Launch settings of one product.

    Attributes:
        m: tokens of a tile.
        o: outputs of a tile.
        j: bytes of packed codes a step.
        split: programs that share the inputs of a tile.
        warps: of a program.
        stages: of the pipeline that loads tiles ahead.
    """

    m: int
    o: int
    j: int
    split: int
    warps: int
    stages: int


def tile(rows: int, outputs: int, columns: int, integer: bool, device: torch.device) -> Tile:
    """Return the settings of a product of [rows, K] with a weight of `columns` bytes a row."""
    measured = MEASURED.get(_name(device), {}).get(key(rows, outputs, columns, integer))
    return rule(rows, outputs, columns, integer, processors(device)) if measured is None else measured


def key(rows: int, outputs: int, columns: int, integer: bool) -> str:
    """Return the name of a product's settings; tokens count by the next power of two, 16 to 2,048."""
    bucket = min(2048, max(16, 1 << (rows - 1).bit_length()))
    return f"{'int8' if integer else '16 bit'} {bucket} x {outputs} x {columns}"


def rule(rows: int, outputs: int, columns: int, integer: bool, processors: int) -> Tile:
    """Return settings for a GPU that nothing was measured on: few tokens are bound by bytes, many by arithmetic.

    Shared memory stays below 99 KB, what compute capability 8.6 and 8.9 have (`tests/kernels` compiles for them).
    """
    m = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    o, j, warps, stages = (64, 128, 4, 3) if m < 64 else (128, 64, 4, 3) if m == 64 else (128, 64, 8, 3)
    if not integer:  # two bytes a number
        m, j = min(m, 64), 64 if m < 64 else 32
    tiles = -(-rows // m) * -(-outputs // o)
    split = 1
    while (
        tiles * split <= processors
        and columns // (2 * split) >= 4 * j  # steps of a program
        and rows * split * 16 <= columns  # partial sums, written and read, against bytes of the weight
        and split < 8
    ):
        split *= 2
    return Tile(m, o, j, split, warps, stages)


def processors(device: torch.device) -> int:
    """Return how many processors a GPU has; 1 of what is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def read_tiles(path: Path) -> dict[str, dict[str, Tile]]:
    """Return measured settings by GPU and product; none where there is no such file."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {gpu: {name: Tile(**settings) for name, settings in tiles.items()} for gpu, tiles in stored.items()}


#: What was measured, read once.
MEASURED = read_tiles(Path(__file__).with_name("tiles.json"))
