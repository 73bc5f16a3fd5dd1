"""Options of round-to-nearest."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator

from starquant.config.methods.base import BlockwiseOptions, WeightSolverOptions


class RTNOptions(BlockwiseOptions):
    """Nothing of its own: grids, granularity and fixed clipping belong to `bits`."""

    reference: ClassVar[str] = "baseline of arXiv 2606.04945, table 1"
    transforms: ClassVar[bool] = False

    algorithm: Literal["rtn"] = "rtn"

    @field_validator("weights")
    @classmethod
    def _validate_weights(cls, weights: WeightSolverOptions) -> WeightSolverOptions:
        if weights.name != "rtn":
            raise ValueError(f"name: got '{weights.name}', allowed: rtn (method=gptq is the other)")
        return weights
