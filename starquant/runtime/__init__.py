"""Quantized modules and exact rewritings.

`install` (the one mutation that installs them by a run's bits) and `probe` are imported by their names: what loads a
packed checkpoint does without a run's description.
"""

from starquant.runtime.attention import OPERANDS, QuantizedAttentionCore
from starquant.runtime.linear import FakeQuantLinear
from starquant.runtime.placing import scale_values, transform_queries_and_keys, transform_values
from starquant.runtime.sites import ActivationQuantizer
from starquant.runtime.token_state import BlockAffine, SiteTransform, StateGate
from starquant.runtime.transforms import (
    HadamardTransform,
    HeadsHadamard,
    KroneckerTransform,
    OrthogonalTransform,
)

__all__ = [
    "OPERANDS",
    "ActivationQuantizer",
    "BlockAffine",
    "FakeQuantLinear",
    "HadamardTransform",
    "HeadsHadamard",
    "KroneckerTransform",
    "OrthogonalTransform",
    "QuantizedAttentionCore",
    "SiteTransform",
    "StateGate",
    "scale_values",
    "transform_queries_and_keys",
    "transform_values",
]
