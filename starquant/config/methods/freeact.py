"""Options of FreeAct (arXiv 2603.01776, second-hand): FlatQuant's, and channels of one token state."""

from __future__ import annotations

from typing import ClassVar, Literal

from starquant.config.methods.base import LearningRate
from starquant.config.methods.flatquant import FlatQuantOptions
from starquant.config.methods.star_quant import FREEACT, GateShare


class FreeActOptions(FlatQuantOptions):
    """FlatQuant's options and the width of the gates.

    Attributes:
        masked: share of each site's transformed channels that only masked tokens use, rounded to whole channels.
        unmasked: share that only the others use.
        first_attention: gate the first block's attention input too, where all masked tokens share one vector.
    """

    reference: ClassVar[str] = "arXiv 2603.01776"

    algorithm: Literal["freeact"] = "freeact"  # type: ignore[assignment]
    masked: GateShare = FREEACT
    unmasked: GateShare = FREEACT
    first_attention: bool = False
    learning_rate: LearningRate = 0.001
    clip_learning_rate: LearningRate = 0.01
