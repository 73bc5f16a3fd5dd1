"""How a product, and a row in front of it, is cut into tiles: settings measured on a GPU if there are any, else a rule.

`starquant tune` measures them; `tiles.json` holds those that are shipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from starquant.errors import ConfigError

#: Rows that settings are told apart by; more share those of as many.
MOST_ROWS = 2048
#: Of a processor: they decide how many programs it holds at a time.
REGISTERS = 65536


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
        columns: of each tile in turn; a tile holds the whole other side.
        warps: of a program.
        registers: of a thread, at most.
    """

    turned: bool
    columns: tuple[int, ...]
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
    if measured is None or (rows > MOST_ROWS and measured.split > 1):  # partial sums of many rows are gigabytes
        return rule(rows, outputs, columns, integer, processors(device))
    return measured


def row_tile(rows: int, width: int, a: int, b: int | None, device: torch.device) -> RowTile:
    """Return the settings of a transform of [rows, width] by factors of a and b; of the identity where b is None."""
    of_gpu = MEASURED.get(_name(device), NOTHING)
    measured = None if b is None else of_gpu.rows.get(row_key(rows, width, a))
    return row_rule(rows, width, a, b, processors(device)) if measured is None else measured


def key(rows: int, outputs: int, columns: int, integer: bool) -> str:
    """Return the name of a product's settings; tokens count by the next power of two, 16 to 2,048."""
    return f"{'int8' if integer else '16 bit'} {_bucket(rows)} x {outputs} x {columns}"


def row_key(rows: int, width: int, a: int) -> str:
    """Return the name of a transform's settings; tokens as `key` counts them."""
    return f"{_bucket(rows)} x {a} x {width // a}"


def _bucket(rows: int) -> int:
    return min(MOST_ROWS, max(16, 1 << (rows - 1).bit_length()))


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
    if columns % (j * split) and columns % (j // 2 * split) == 0:  # bytes behind a mask are read one by one
        j //= 2
    return Tile(m, o, j, split, warps, stages)


def _tiles(rows: int, outputs: int, tile: tuple[int, ...]) -> int:
    return -(-rows // tile[0]) * -(-outputs // tile[1])


def row_tiles(a: int, b: int) -> tuple[int, tuple[int, ...]]:
    """Return how a row [a, b] is cut between two factors: all of a, padded, and the columns of each tile.

    Tiles of 128, and what is left in one or two, whichever pads it less.
    """
    left, sizes = b % 128, (16, 32, 64, 128)
    rests = [(size,) for size in sizes if size >= left]
    rests += [(large, small) for large in sizes for small in sizes if small <= large and small + large >= left]
    rest = min(rests, key=lambda rest: (sum(rest), len(rest))) if left else ()
    return max(16, 1 << (a - 1).bit_length()), (128,) * (b // 128) + rest


def padded(a: int, b: int) -> int:
    """Return how many numbers the tiles of a row [a, b] hold."""
    rows, columns = row_tiles(a, b)
    return rows * sum(columns)


def is_turned(a: int, b: int) -> bool:
    """Return whether a row [a, b] is multiplied as [b, a], whose tiles pad it less."""
    return padded(b, a) < padded(a, b)


def row_rule(rows: int, width: int, a: int, b: int | None, processors: int) -> RowTile:
    """Return settings of a transform for a GPU that nothing was measured on.

    Few rows are over when a single one is, which more warps share, and all of its registers; of many, as many as
    possible are under way, where a row does not spill too much of itself for that.
    """
    turned = b is not None and is_turned(a, b)
    sides = (width // a, a) if turned else (a, width // a)
    numbers, few = padded(*sides), rows <= processors
    alone = numbers > 16384 or (numbers > 4096 and few)
    return RowTile(turned, row_tiles(*sides)[1], 8 if few or numbers > 4096 else 4, 248 if alone else 128)


def processors(device: torch.device) -> int:
    """Return how many processors a GPU has; 1 of what is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _row_tile(settings: dict[str, Any]) -> RowTile:
    return RowTile(**settings | {"columns": tuple(settings["columns"])})


def read_tiles(path: Path) -> dict[str, Measured]:
    """Return measured settings by GPU; none without the file; raises ConfigError where it holds something else."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            gpu: Measured(
                {name: Tile(**settings) for name, settings in kinds.get("products", {}).items()},
                {name: _row_tile(settings) for name, settings in kinds.get("rows", {}).items()},
            )
            for gpu, kinds in stored.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: holds no launch settings ({type(error).__name__}: {error}); remove it") from None


def add(measured: dict[str, Measured]) -> None:
    """Let measured settings go before those that are known."""
    for gpu, new in measured.items():
        known = MEASURED.get(gpu, NOTHING)
        MEASURED[gpu] = Measured(known.products | new.products, known.rows | new.rows)


NOTHING = Measured({}, {})
#: What was measured, read once.
MEASURED = read_tiles(Path(__file__).with_name("tiles.json"))
