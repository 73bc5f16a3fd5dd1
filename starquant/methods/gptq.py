"""GPTQ (arXiv 2210.17323): weights rounded column by column, each error compensated in the columns that follow.

The Hessian is the second moment of what each linear reads on the calibration states. Activations are rounded per
token as under RTN. As a weight solver GPTQ is open to every method that transforms: `method.weights.name=gptq`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from starquant.methods.base import Card
from starquant.methods.blockwise import BlockwiseMethod, BlockwiseOptions
from starquant.methods.solvers import WeightSolverOptions


class GPTQOptions(BlockwiseOptions):
    """Nothing of its own: `weights` holds the solver's settings."""

    name: Literal["gptq"]
    weights: WeightSolverOptions = WeightSolverOptions(name="gptq", mse_clip=True)

    @field_validator("weights")
    @classmethod
    def _solves(cls, weights: WeightSolverOptions) -> WeightSolverOptions:
        if weights.name != "gptq":
            raise ValueError(f"name: got '{weights.name}', allowed: gptq (method=rtn is the other)")
        return weights


class GPTQ(BlockwiseMethod[GPTQOptions]):
    """GPTQ on the untransformed model."""

    card = Card(reference="arXiv 2210.17323", transforms=False)
    Options = GPTQOptions
