"""Options of round-to-nearest."""

from __future__ import annotations

from typing import ClassVar, Literal

from starquant.config.methods.base import BlockwiseOptions


class RTNOptions(BlockwiseOptions):
    """Nothing of its own: grids, granularity and fixed clipping belong to `bits`."""

    reference: ClassVar[str] = "baseline of arXiv 2606.04945, table 1"
    transforms: ClassVar[bool] = False
    solver: ClassVar[str | None] = "rtn"

    algorithm: Literal["rtn"] = "rtn"
