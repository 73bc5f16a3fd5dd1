"""Options of GPTQ (arXiv 2210.17323)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator

from starquant.config.methods.base import BlockwiseOptions, WeightSolverOptions


class GPTQOptions(BlockwiseOptions):
    """Nothing of its own: `weights` holds the solver's settings."""

    reference: ClassVar[str] = "arXiv 2210.17323"
    transforms: ClassVar[bool] = False

    algorithm: Literal["gptq"] = "gptq"
    weights: WeightSolverOptions = WeightSolverOptions(name="gptq", mse_clip=True)

    @field_validator("weights")
    @classmethod
    def _validate_weights(cls, weights: WeightSolverOptions) -> WeightSolverOptions:
        if weights.name != "gptq":
            raise ValueError(f"name: got '{weights.name}', allowed: gptq (method=rtn is the other)")
        return weights
