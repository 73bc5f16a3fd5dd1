"""Quantized modules, exact rewritings, and the one mutation that installs them in a model."""

from starquant.runtime.attention import OPERANDS, QuantizedAttentionCore
from starquant.runtime.install import (
    WeightSolver,
    activation_format,
    check_fit,
    install,
    is_tied,
    quantize_block,
    quantize_linear,
    round_to_nearest,
    weight_format,
)
from starquant.runtime.linear import FakeQuantLinear
from starquant.runtime.placing import scale_values, transform_queries_and_keys, transform_values
from starquant.runtime.probe import measure_operands
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
    "WeightSolver",
    "activation_format",
    "check_fit",
    "install",
    "is_tied",
    "measure_operands",
    "quantize_block",
    "quantize_linear",
    "round_to_nearest",
    "scale_values",
    "transform_queries_and_keys",
    "transform_values",
    "weight_format",
]
