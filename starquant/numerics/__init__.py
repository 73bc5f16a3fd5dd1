"""Pure tensor mathematics of quantization; imports torch and no other room."""

from starquant.numerics.clipping import mse_clip, output_clip
from starquant.numerics.formats import Granularity, PerChannel, PerGroup, PerToken, QuantFormat
from starquant.numerics.gptq import GPTQResult, gptq
from starquant.numerics.hadamard import (
    apply_hadamard,
    hadamard_matrix,
    has_hadamard,
    random_orthogonal,
    random_signs,
)
from starquant.numerics.metrics import SqnrMeter, sqnr_db
from starquant.numerics.moments import ChannelMoments, RowSample, SecondMoment
from starquant.numerics.rotation import Rotation, random_rotation
from starquant.numerics.rounding import Quantized, dequantize, fake_quantize, quantize

__all__ = [
    "ChannelMoments",
    "GPTQResult",
    "Granularity",
    "PerChannel",
    "PerGroup",
    "PerToken",
    "QuantFormat",
    "Quantized",
    "Rotation",
    "RowSample",
    "SecondMoment",
    "SqnrMeter",
    "apply_hadamard",
    "dequantize",
    "fake_quantize",
    "gptq",
    "hadamard_matrix",
    "has_hadamard",
    "mse_clip",
    "output_clip",
    "quantize",
    "random_orthogonal",
    "random_rotation",
    "random_signs",
    "sqnr_db",
]
