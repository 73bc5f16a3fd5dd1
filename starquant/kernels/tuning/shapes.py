"""What is multiplied, and transformed in front of that: the shapes that settings are measured for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from starquant.kernels.tiles import RowTile, Tile, key, row_key


@dataclass(frozen=True)
class Product:
    """rows x K times K x outputs.

    Attributes:
        outputs: of all linears that are multiplied as one.
        width: K.
        bits: of the weight.
        integer: whether activations are; else they are multiplied as they are (W4A16).
    """

    kind: ClassVar = "products"  # of settings (`tiles.Measured`)
    outputs: int
    width: int
    bits: int
    integer: bool = True

    @property
    def columns(self) -> int:
        """Bytes of a row of the weight."""
        return self.width // 2 if self.bits <= 4 else self.width

    def key(self, rows: int) -> str:
        """Return the name of its settings."""
        return key(rows, self.outputs, self.columns, self.integer)

    def kernel(self, tile: Tile) -> tuple[object, ...]:
        """Return what decides which kernel is compiled."""
        even = self.columns % (tile.j * tile.split) == 0
        return self.bits, self.integer, even, tile.m, tile.o, tile.j, tile.split > 1, tile.warps, tile.stages


@dataclass(frozen=True)
class Transform:
    """P = A (x) B of rows, behind SwiGLU or a norm.

    Attributes:
        width: of a row.
        a: size of A.
        swiglu: which stands in front.
    """

    kind: ClassVar = "rows"
    width: int
    a: int
    swiglu: bool

    @property
    def b(self) -> int:
        """Size of B."""
        return self.width // self.a

    def key(self, rows: int) -> str:
        """Return the name of its settings."""
        return row_key(rows, self.width, self.a)

    def kernel(self, settings: RowTile) -> tuple[object, ...]:
        """Return what decides which kernel is compiled."""
        return self, settings


#: LLaDA-8B's and Dream-7B's at W4A4: q, k and v are one product, gate and up another.
PUBLISHED: tuple[Product | Transform, ...] = (
    *(Product(outputs, 4096, 4) for outputs in (12288, 4096, 24576)),
    Product(4096, 12288, 4),
    *(Product(outputs, 3584, 4) for outputs in (4608, 3584, 37888)),
    Product(3584, 18944, 4),
    Transform(4096, 64, False),
    Transform(12288, 96, True),
    Transform(3584, 56, False),
    Transform(18944, 128, True),
)

#: Their heads at 8 bits, which few tokens ask for at a time.
PUBLISHED_HEADS: tuple[Product, ...] = (Product(126464, 4096, 8, False), Product(152064, 3584, 8, False))
