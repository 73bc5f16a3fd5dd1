"""Options of GPTQ (arXiv 2210.17323)."""

from __future__ import annotations

from typing import ClassVar, Literal

from starquant.config.methods.base import BlockwiseOptions, WeightSolverOptions


class GPTQOptions(BlockwiseOptions):
    """Nothing of its own: `weights` holds the solver's settings."""

    reference: ClassVar[str] = "arXiv 2210.17323"
    transforms: ClassVar[bool] = False
    solver: ClassVar[str | None] = "gptq"

    algorithm: Literal["gptq"] = "gptq"
    weights: WeightSolverOptions = WeightSolverOptions(name="gptq", mse_clip=True)
