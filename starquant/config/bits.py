"""Bit-widths and grids of everything that can be quantized. Plain validated data, no torch."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import ValidationError

from starquant.config.fields import Count, Name, Ratio, Spec
from starquant.config.messages import explain
from starquant.errors import CheckpointError

Bits = Literal[2, 3, 4, 8, 16]


class WeightSpec(Spec):
    """How weights are quantized: per output channel, or per group of `group_size` inputs."""

    bits: Bits
    symmetric: bool = True
    group_size: Count | None = None
    clip_ratio: Ratio = 1.0


class ActivationSpec(Spec):
    """How inputs of linears are quantized: dynamically, one scale a token."""

    bits: Bits
    symmetric: bool = True
    clip_ratio: Ratio = 1.0


class AttentionSpec(Spec):
    """Bits of the attention operands: queries, keys, probabilities (softmax output) and values."""

    q: Bits = 16
    k: Bits = 16
    p: Bits = 16
    v: Bits = 16


class BitsSpec(Spec):
    """Bit-widths of everything that can be quantized; 16 leaves it at full precision."""

    name: Name
    weights: WeightSpec
    activations: ActivationSpec
    attention: AttentionSpec = AttentionSpec()
    embedding: Bits = 16
    head: Bits = 16

    @property
    def full_precision(self) -> bool:
        """Whether nothing is quantized."""
        attention = self.attention
        widths = (self.weights.bits, self.activations.bits, self.embedding, self.head)
        return {*widths, attention.q, attention.k, attention.p, attention.v} == {16}


def weights_only(bits: BitsSpec) -> BitsSpec:
    """Return the same with activations and attention operands at full precision."""
    activations = bits.activations.model_copy(update={"bits": 16})
    return bits.model_copy(update={"activations": activations, "attention": AttentionSpec()})


def bits_of(data: Any, where: str) -> BitsSpec:
    """Return the bits that a packed checkpoint says it has; raises CheckpointError, led by `where`, for other data."""
    try:
        return BitsSpec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise CheckpointError(f"{where}: {explain(BitsSpec, error.errors()[0], {})}") from None


def in_words(bits: dict[str, Any]) -> str:
    """Return the preset's name, and every width, grouping and clipping that it does not tell.

    Args:
        bits: `BitsSpec` as plain data, as records hold it.
    """
    details = {f"{x}={bits['attention'][x]}" for x in "qkpv" if bits["attention"][x] < 16}
    details |= {f"{part}={bits[part]}" for part in ("embedding", "head") if bits[part] < 16}
    details |= {f"group={bits['weights']['group_size']}"} if bits["weights"]["group_size"] else set()
    for part in ("weights", "activations"):
        details |= {f"{part} clip={bits[part]['clip_ratio']:g}"} if bits[part]["clip_ratio"] < 1 else set()
        details |= set() if bits[part]["symmetric"] else {f"{part} asymmetric"}
    widths = f"w{bits['weights']['bits']}a{bits['activations']['bits']}"
    name = bits["name"] if bits["name"] == widths else f"{bits['name']} ({widths})"
    return name + (f" [{', '.join(sorted(details))}]" if details else "")


FULL_PRECISION = BitsSpec(name="w16a16", weights=WeightSpec(bits=16), activations=ActivationSpec(bits=16))
