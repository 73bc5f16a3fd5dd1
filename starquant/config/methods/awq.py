"""Options of AWQ (arXiv 2306.00978)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from starquant.config.methods.base import BlockwiseOptions


class AWQOptions(BlockwiseOptions):
    """What is searched.

    Attributes:
        scale: search scales.
        clip: search clip ratios of rounded weights; `weights.mse_clip` then concerns only queries and keys.
        grid: alphas tried, from 0 (no scaling) in steps of 1 / grid.
    """

    reference: ClassVar[str] = "arXiv 2306.00978"
    transforms: ClassVar[bool] = True

    algorithm: Literal["awq"] = "awq"
    scale: bool = True
    clip: bool = True
    grid: Annotated[int, Field(ge=1, le=1000)] = 20

    @property
    def needs_calibration(self) -> bool:
        """Activation magnitudes and second moments are measured."""
        return True
