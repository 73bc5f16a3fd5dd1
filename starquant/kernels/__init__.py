"""Integer products of quantized activations and packed weights: a PyTorch reference, and Triton kernels for GPUs.

Shape suffixes: M tokens, K inputs, O outputs, J = K / 2 bytes of packed codes.
"""

from starquant.kernels.dispatch import integer_linear, mixed_linear, quantize_tokens, uses_triton, value_linear
from starquant.kernels.heads import turn_heads
from starquant.kernels.offsets import sums_fit, weight_offsets
from starquant.kernels.tokens import Affine, IntegerTokens, Kronecker, Norm, Prologue, TokenStates

__all__ = [
    "Affine",
    "IntegerTokens",
    "Kronecker",
    "Norm",
    "Prologue",
    "TokenStates",
    "integer_linear",
    "mixed_linear",
    "quantize_tokens",
    "sums_fit",
    "turn_heads",
    "uses_triton",
    "value_linear",
    "weight_offsets",
]
