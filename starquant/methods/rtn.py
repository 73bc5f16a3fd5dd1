"""RTN: round weights and activations to the nearest grid point, with no calibration."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from starquant.methods.base import Card
from starquant.methods.blockwise import BlockwiseMethod, BlockwiseOptions
from starquant.methods.solvers import WeightSolverOptions


class RTNOptions(BlockwiseOptions):
    """Nothing of its own: grids, granularity and fixed clipping belong to `bits`."""

    name: Literal["rtn"]

    @field_validator("weights")
    @classmethod
    def _rounds(cls, weights: WeightSolverOptions) -> WeightSolverOptions:
        if weights.name != "rtn":
            raise ValueError(f"name: got '{weights.name}', allowed: rtn (method=gptq is the other)")
        return weights


class RTN(BlockwiseMethod[RTNOptions]):
    """Round-to-nearest."""

    card = Card(reference="baseline of arXiv 2606.04945, table 1", transforms=False)
    Options = RTNOptions
