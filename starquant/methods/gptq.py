"""GPTQ (arXiv 2210.17323): weights rounded column by column, each error compensated in the columns that follow.

The Hessian is the second moment of what each linear reads on the calibration states. Activations are rounded per
token as under RTN. As a weight solver GPTQ is open to every method that transforms: `method.weights.name=gptq`.
"""

from __future__ import annotations

from starquant.config.methods.gptq import GPTQOptions
from starquant.methods.blockwise import BlockwiseMethod


class GPTQ(BlockwiseMethod[GPTQOptions]):
    """GPTQ on the untransformed model."""
