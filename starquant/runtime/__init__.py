"""Quantized modules and the one mutation that installs them in a model."""

from starquant.runtime.attention import QuantizedAttentionCore
from starquant.runtime.install import WeightSolver, install, round_to_nearest
from starquant.runtime.linear import FakeQuantLinear
from starquant.runtime.probe import measure_operands
from starquant.runtime.sites import ActivationQuantizer

__all__ = [
    "ActivationQuantizer",
    "FakeQuantLinear",
    "QuantizedAttentionCore",
    "WeightSolver",
    "install",
    "measure_operands",
    "round_to_nearest",
]
