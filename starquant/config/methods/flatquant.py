"""Options of FlatQuant (arXiv 2410.09426): what is learned of every block, and how."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from starquant.config.fields import Seed, Share
from starquant.config.methods.base import BlockwiseOptions, LearningRate, Products


class FlatQuantOptions(BlockwiseOptions):
    """What is learned, from where it starts, and how long.

    Attributes:
        diagonal: scale channels in front of the transforms behind a norm and of the down projection's.
        diagonal_alpha: they start at w_max^(1 - alpha) / x_max^alpha.
        clips: learn how much of its range each weight row, input and attention operand covers, at both ends.
        clip_start: ratio that every clip starts at, below 1.
        start_seed: of the random orthogonal matrices that transforms start from.
        epochs: passes over the calibration states, a block.
        batch: states of a step.
        learning_rate: of transforms and channel scales, of AdamW.
        clip_learning_rate: of the logits of the clip ratios.
        products: of float32 matrices while it is learned: "float32", or "bfloat16" where the machine multiplies these
            faster; "auto" is bfloat16 where something is rounded to at most 4 bits.
        final_rate: where a cosine ends, as a share of `learning_rate`.
    """

    reference: ClassVar[str] = "arXiv 2410.09426"
    transforms: ClassVar[bool] = True

    algorithm: Literal["flatquant"] = "flatquant"
    diagonal: bool = True
    diagonal_alpha: Share = 0.3
    clips: bool = True
    clip_start: Annotated[float, Field(ge=0.01, le=0.9999)] = 0.982
    start_seed: Seed = 0
    epochs: Annotated[int, Field(ge=1, le=1000)] = 4
    batch: Annotated[int, Field(ge=1, le=4096)] = 4
    learning_rate: LearningRate = 0.005
    clip_learning_rate: LearningRate = 0.05
    final_rate: Share = 0.001
    products: Products = "float32"

    @property
    def online(self) -> tuple[str, ...]:
        """All of it."""
        return ("algorithm",)

    @property
    def needs_calibration(self) -> bool:
        """Everything is learned from data."""
        return True
