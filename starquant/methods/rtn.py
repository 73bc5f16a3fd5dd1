"""RTN: round weights and activations to the nearest grid point, with no calibration."""

from __future__ import annotations

from starquant.config.methods.rtn import RTNOptions
from starquant.methods.blockwise import BlockwiseMethod


class RTN(BlockwiseMethod[RTNOptions]):
    """Round-to-nearest."""
