"""Which bits a GGUF can hold, told before anything is computed. Plain data, no torch."""

from __future__ import annotations

from starquant.config.bits import BitsSpec
from starquant.config.methods.base import MethodOptions
from starquant.errors import ConfigError

#: Presets of bits and methods that a GGUF holds.
ALLOWED_BITS = "bits=q4_0, bits=q8_0, or method=none"
ALLOWED_METHODS = "method=rtn, gptq, awq, quarot_folded, plus_folded"
#: What to do where llama.cpp is missing.
INSTALL = "pip install 'starquant[llama]' (it compiles llama.cpp: a C++ compiler and cmake are needed)"


def validate_gguf(method: MethodOptions, bits: BitsSpec) -> None:
    """Judge what is to be written as a GGUF.

    Raises:
        ConfigError: something that is computed between the linears, a grid that llama.cpp does not have.
    """
    weights, activations = bits.weights, bits.activations
    odd = None
    if weights.bits < 16 and weights.block is None:
        odd = f"bits.weights.block: got null with bits={weights.bits}"
    elif weights.bits < 16 and (activations.block is None or activations.bits == 16):
        odd = f"bits.activations: got {activations.bits} bits, but llama.cpp rounds inputs to 8 in blocks of 32"
    elif weights.bits == 16 and activations.bits < 16:
        odd = f"bits.activations: got {activations.bits} bits with weights at 16"
    elif activations.bits < 16 and activations.clip_ratio < 1.0:
        odd = f"bits.activations.clip_ratio: got {activations.clip_ratio}"
    elif min(bits.embedding, bits.head) < 16 and bits.tables == "rows":
        odd = "bits.tables: got rows"
    elif min(getattr(bits.attention, name) for name in "qkpv") < 16:
        odd = "bits.attention: got operands below 16 bits"
    if odd is not None:
        raise ConfigError(f"{odd}; a GGUF (export.format=gguf) does not hold that; allowed: {ALLOWED_BITS}")
    if method.online:
        raise ConfigError(
            f"method.{method.online[0]}: method={method.name} computes between the linears, which a GGUF "
            f"(export.format=gguf) does not hold; allowed: {ALLOWED_METHODS}"
        )
