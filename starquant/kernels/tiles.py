"""How a product, and a row in front of it, is cut into tiles: settings measured on a GPU if there are any, else a rule.

`benchmarks/tiles.py` measures them and writes `tiles.json`.
"""

from __future__ import annotations

import json
import math
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


@dataclass(frozen=True)
class RowTile:
    """Launch settings of a transform A (x) B of rows [a, b].

    Attributes:
        turned: whether a row is multiplied as [b, a].
        columns: of a tile, which holds the whole other side.
        warps: of a program.
        registers: of a thread, at most.
    """

    turned: bool
    columns: int
    warps: int
    registers: int


@dataclass(frozen=True)
class Measured:
    """What was measured on a GPU: settings by `key` and by `row_key`."""

    products: dict[str, Tile]
    rows: dict[str, RowTile]


def tile(rows: int, outputs: int, columns: int, integer: bool, device: torch.device) -> Tile:
    """Return the settings of a product of [rows, K] with a weight of `columns` bytes a row."""
    measured = MEASURED.get(_name(device), NOTHING).products.get(key(rows, outputs, columns, integer))
    return rule(rows, outputs, columns, integer, processors(device)) if measured is None else measured


def row_tile(rows: int, width: int, a: int, b: int | None, device: torch.device) -> RowTile:
    """Return the settings of a transform of [rows, width] by factors of a and b; of the identity where b is None."""
    measured = MEASURED.get(_name(device), NOTHING).rows.get(row_key(rows, width, a))
    return row_rule(rows, width, a, b, processors(device)) if measured is None else measured


def key(rows: int, outputs: int, columns: int, integer: bool) -> str:
    """Return the name of a product's settings; tokens count by the next power of two, 16 to 2,048."""
    return f"{'int8' if integer else '16 bit'} {_bucket(rows)} x {outputs} x {columns}"


def row_key(rows: int, width: int, a: int) -> str:
    """Return the name of a transform's settings; tokens as `key` counts them."""
    return f"{_bucket(rows)} x {a} x {width // a}"


def _bucket(rows: int) -> int:
    return min(2048, max(16, 1 << (rows - 1).bit_length()))


#: Tokens, outputs, bytes a step, warps and stages of a product of many tokens, the largest tile first.
LARGE = ((128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 64, 128, 4, 4))


def rule(rows: int, outputs: int, columns: int, integer: bool, processors: int) -> Tile:
    """Return settings for a GPU that nothing was measured on: few tokens are bound by bytes, many by arithmetic.

    A larger tile reads less, if its programs still fill the processors. Shared memory stays below 99 KB, what compute
    capability 8.6 and 8.9 have (`tests/kernels` compiles for them).
    """
    if rows <= 32:
        m, o, j, warps, stages = 16 if rows <= 16 else 32, 64, 128, 4, 3
    elif rows <= 64:
        m, o, j, warps, stages = 64, 128, 64, 4, 3
    else:
        filling = (tile for tile in LARGE if 10 * _tiles(rows, outputs, tile) >= 9 * processors)
        m, o, j, warps, stages = next(filling, LARGE[-1]) if integer else LARGE[0]
    if not integer:  # two bytes a number
        m, j = min(m, 64), 64 if m < 64 else 32
    tiles = _tiles(rows, outputs, (m, o))
    split = 1
    while (
        tiles * split <= processors
        and columns // (2 * split) >= 4 * j  # steps of a program
        and rows * split * 16 < columns  # partial sums, written and read, against bytes of the weight
        and split < 8
    ):
        split *= 2
    return Tile(m, o, j, split, warps, stages)


def _tiles(rows: int, outputs: int, tile: tuple[int, ...]) -> int:
    return -(-rows // tile[0]) * -(-outputs // tile[1])


def row_tiles(a: int, b: int) -> tuple[int, int, int]:
    """Return how a row [a, b] is cut between two factors: all of a, columns that pad b least, and how many tiles."""
    columns = min((128, 64, 32, 16), key=lambda columns: -(-b // columns) * columns)  # of equals the widest
    return max(16, 1 << (a - 1).bit_length()), columns, -(-b // columns)


def padded(a: int, b: int) -> int:
    """Return how many numbers the tiles of a row [a, b] hold."""
    return math.prod(row_tiles(a, b))


def is_turned(a: int, b: int) -> bool:
    """Return whether a row [a, b] is multiplied as [b, a], whose tiles pad it less."""
    return padded(b, a) < padded(a, b)


def row_rule(rows: int, width: int, a: int, b: int | None, processors: int) -> RowTile:
    """Return settings of a transform for a GPU that nothing was measured on.

    Few rows are over when a single one is, which more warps share; of many, as many as possible are under way. What no
    registers hold is kept in the first cache.
    """
    turned = b is not None and is_turned(a, b)
    sides = (width // a, a) if turned else (a, width // a)
    wide = padded(*sides) > 4096
    warps = 8 if wide or rows <= processors else 4
    return RowTile(turned, row_tiles(*sides)[1], warps, 128)


def processors(device: torch.device) -> int:
    """Return how many processors a GPU has; 1 of what is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def read_tiles(path: Path) -> dict[str, Measured]:
    """Return measured settings by GPU; none where there is no such file."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {
        gpu: Measured(
            {name: Tile(**settings) for name, settings in kinds.get("products", {}).items()},
            {name: RowTile(**settings) for name, settings in kinds.get("rows", {}).items()},
        )
        for gpu, kinds in stored.items()
    }


NOTHING = Measured({}, {})
#: What was measured, read once.
MEASURED = read_tiles(Path(__file__).with_name("tiles.json"))
