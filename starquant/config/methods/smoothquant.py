"""Options of SmoothQuant (arXiv 2211.10438)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from starquant.config.fields import Rows, Share
from starquant.config.methods.base import BlockwiseOptions

SiteName = Literal["qkv_input", "out_input", "gate_up_input", "down_input"]


class SmoothQuantOptions(BlockwiseOptions):
    """Migration strength and where it is applied.

    Attributes:
        alpha: migration strength; 0 makes every channel's largest weight 1, 1 its largest activation.
        search: take, for each site, the alpha of a grid with the smallest quantized output error instead.
        search_rows: rows a token state that the search looks at.
        sites: inputs that are smoothed.
    """

    reference: ClassVar[str] = "arXiv 2211.10438"
    transforms: ClassVar[bool] = True

    algorithm: Literal["smoothquant"] = "smoothquant"
    alpha: Share = 0.85
    search: bool = False
    search_rows: Rows = 256
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1)] = ("qkv_input", "gate_up_input")

    @property
    def needs_calibration(self) -> bool:
        """Channel maxima are measured."""
        return True
