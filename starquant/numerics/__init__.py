"""Pure tensor mathematics of quantization; imports torch and no other room."""

from starquant.numerics.formats import Granularity, PerChannel, PerGroup, PerToken, QuantFormat
from starquant.numerics.metrics import SqnrMeter, sqnr_db
from starquant.numerics.rounding import Quantized, dequantize, fake_quantize, quantize

__all__ = [
    "Granularity",
    "PerChannel",
    "PerGroup",
    "PerToken",
    "QuantFormat",
    "Quantized",
    "SqnrMeter",
    "dequantize",
    "fake_quantize",
    "quantize",
    "sqnr_db",
]
