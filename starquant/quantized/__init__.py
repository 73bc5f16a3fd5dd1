"""Quantized modules, online transforms and exact rewritings of full-precision models.

`install` (the one mutation that installs them by a run's bits) and `probe` (what it lost) are imported by their names:
what loads a packed checkpoint does without a run's description.
"""

from starquant.quantized.activation_quantizer import ActivationQuantizer
from starquant.quantized.attention import (
    OPERANDS,
    QuantizedAttentionCore,
    set_operand_clips,
    set_static_value_scales,
    transform_queries_and_keys,
    transform_values,
)
from starquant.quantized.fake_quant_linear import FakeQuantLinear
from starquant.quantized.state_transforms import BlockAffine, SiteTransform, StateGate
from starquant.quantized.transforms import (
    HadamardTransform,
    HeadsHadamard,
    InvertibleKronecker,
    InvertibleTransform,
    KeyTransform,
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
    "InvertibleKronecker",
    "InvertibleTransform",
    "KeyTransform",
    "KroneckerTransform",
    "OrthogonalTransform",
    "QuantizedAttentionCore",
    "SiteTransform",
    "StateGate",
    "set_operand_clips",
    "set_static_value_scales",
    "transform_queries_and_keys",
    "transform_values",
]
