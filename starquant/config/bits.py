"""Bit-widths and grids of everything that can be quantized. Plain validated data, no torch."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from starquant.config.fields import INERT, Count, Name, Ratio, Spec, Whole
from starquant.config.messages import explain
from starquant.errors import CheckpointError

Bits = Annotated[Literal[2, 3, 4, 8, 16], Whole]


#: Numbers that share a scale in blocks of llama.cpp, and the bits of each block type.
BLOCK_SIZE = 32
BLOCK_BITS = {"q4_0": 4, "q8_0": 8}


class WeightSpec(Spec):
    """How weights are quantized: per output channel, or per group of `group_size` inputs.

    Attributes:
        block: block type of llama.cpp whose scales they have (`numerics.formats.QuantFormat`); None for float32 scales.
    """

    bits: Bits
    symmetric: bool = True
    group_size: Count | None = None
    clip_ratio: Ratio = 1.0
    block: Literal["q4_0", "q8_0"] | None = None

    @model_validator(mode="after")
    def _validate_block(self) -> WeightSpec:
        if self.block is not None:
            wanted = (BLOCK_BITS[self.block], True, BLOCK_SIZE)
            if (self.bits, self.symmetric, self.group_size) != wanted:
                raise ValueError(
                    f"block: got {self.block} with bits={self.bits}, symmetric={str(self.symmetric).lower()}, "
                    f"group_size={self.group_size}, allowed: bits={wanted[0]}, symmetric=true, group_size={BLOCK_SIZE}"
                )
        return self


class ActivationSpec(Spec):
    """How inputs of linears are quantized: dynamically, one scale a token.

    Attributes:
        block: "q8_0" for one scale in 32 channels, as llama.cpp's integer products have it; None for one a token.
    """

    bits: Bits
    symmetric: bool = True
    clip_ratio: Ratio = 1.0
    block: Literal["q8_0"] | None = None

    @model_validator(mode="after")
    def _validate_block(self) -> ActivationSpec:
        if self.block is not None and (self.bits not in (8, 16) or not self.symmetric):
            raise ValueError(
                f"block: got {self.block} with bits={self.bits}, symmetric={str(self.symmetric).lower()}, "
                "allowed: bits=8 (or 16, for none), symmetric=true"
            )
        return self


class AttentionSpec(Spec):
    """Bits of the attention operands: queries, keys, probabilities (softmax output) and values; the grid of K and V.

    Attributes:
        kv_at: of block diffusion, when keys and values are rounded: at every "read", or at "commit": those of the block
            that is denoised are used as they are, and rounded once, when it is finished and they are kept.
    """

    q: Bits = 16
    k: Bits = 16
    p: Bits = 16
    v: Bits = 16
    kv_symmetric: bool = True
    kv_clip_ratio: Ratio = 1.0
    kv_at: Literal["read", "commit"] = "read"

    @model_validator(mode="after")
    def _validate_commit(self) -> AttentionSpec:
        if self.kv_at == "commit" and min(self.k, self.v) == 16:
            raise ValueError("kv_at: got commit with k=16, v=16, allowed: read, or k or v below 16")
        return self

    def identity(self) -> dict[str, Any]:
        """Return what can change a score: the grid of K and V, and when they are rounded, only where it is unusual."""
        common = min(self.k, self.v) == 16 or (self.kv_symmetric and self.kv_clip_ratio == 1.0)
        left_out = {"kv_symmetric", "kv_clip_ratio"} if common else set[str]()
        return self.model_dump(exclude=left_out | ({"kv_at"} if self.kv_at == "read" else set()))


class AuthorsGrid(Spec):
    """What a method's authors round to, where it is not the common grid: symmetric, unclipped."""

    weights_symmetric: bool = True
    activations_symmetric: bool = True
    activation_clip: Ratio = 1.0
    kv_symmetric: bool = True
    kv_clip: Ratio = 1.0

    def concerns(self, bits: BitsSpec) -> bool:
        """Return whether anything that is rounded at these bits is rounded otherwise than on the common grid."""
        weights = bits.weights.bits < 16 and not self.weights_symmetric
        activations = bits.activations.bits < 16 and (not self.activations_symmetric or self.activation_clip < 1.0)
        quantizes_kv = min(bits.attention.k, bits.attention.v) < 16
        return weights or activations or (quantizes_kv and (not self.kv_symmetric or self.kv_clip < 1.0))


class BitsSpec(Spec):
    """Bit-widths of everything that can be quantized; 16 leaves it at full precision.

    Attributes:
        grid: "authors" rounds as the method's authors do (`method.authors`) wherever the fields here are at the common
            grid's values; "common" is one grid for all methods, as it stands here. Inert: a run's canonical form holds
            the values that it comes to. Blocks are one grid for all methods as well.
        tables: what shares a scale in a quantized embedding and head: a vocabulary row, or a block of llama.cpp (Q4_0
            at 4 bits, Q8_0 at 8), for which the head's input is quantized as well.
    """

    name: Name
    grid: Literal["authors", "common"] = Field(default="authors", json_schema_extra=INERT)
    weights: WeightSpec
    activations: ActivationSpec
    attention: AttentionSpec = AttentionSpec()
    embedding: Bits = 16
    head: Bits = 16
    tables: Literal["rows", "blocks"] = "rows"

    @model_validator(mode="after")
    def _validate_tables(self) -> BitsSpec:
        for name in ("embedding", "head"):
            if self.tables == "blocks" and getattr(self, name) not in (4, 8, 16):
                raise ValueError(f"{name}: got {getattr(self, name)} with tables=blocks, allowed: 4, 8, 16")
        return self

    @property
    def in_blocks(self) -> bool:
        """Whether anything is on a grid of llama.cpp's blocks."""
        tables = self.tables == "blocks" and min(self.embedding, self.head) < 16
        return tables or self.weights.block is not None or self.activations.block is not None

    def identity(self) -> dict[str, Any]:
        """Return what can change a score: what llama.cpp's blocks are about only where they are chosen."""
        whole = self.model_dump(exclude={"grid"})
        whole["attention"] = self.attention.identity()
        for part in ("weights", "activations"):
            if whole[part]["block"] is None:
                del whole[part]["block"]
        if self.tables == "rows" or self.embedding == self.head == 16:
            del whole["tables"]
        return whole

    @property
    def full_precision(self) -> bool:
        """Whether nothing is quantized."""
        attention = self.attention
        widths = (self.weights.bits, self.activations.bits, self.embedding, self.head)
        return {*widths, attention.q, attention.k, attention.p, attention.v} == {16}

    def on_grid_of(self, authors: AuthorsGrid | None) -> BitsSpec:
        """Return the bits on the grid that `grid` asks for; what is not at the common grid's value already stays."""
        if authors is None or self.grid == "common" or self.in_blocks:
            return self
        weights, activations, attention = self.weights, self.activations, self.attention
        if weights.bits < 16:
            weights = weights.model_copy(update={"symmetric": weights.symmetric and authors.weights_symmetric})
        if activations.bits < 16:
            update = {
                "symmetric": activations.symmetric and authors.activations_symmetric,
                "clip_ratio": authors.activation_clip if activations.clip_ratio == 1.0 else activations.clip_ratio,
            }
            activations = activations.model_copy(update=update)
        if min(attention.k, attention.v) < 16:
            update = {
                "kv_symmetric": attention.kv_symmetric and authors.kv_symmetric,
                "kv_clip_ratio": authors.kv_clip if attention.kv_clip_ratio == 1.0 else attention.kv_clip_ratio,
            }
            attention = attention.model_copy(update=update)
        return self.model_copy(update={"weights": weights, "activations": activations, "attention": attention})


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
        details |= {f"{part} in {bits[part]['block']}"} if bits[part].get("block") else set()
        details |= {f"{part} clip={bits[part]['clip_ratio']:g}"} if bits[part]["clip_ratio"] < 1 else set()
        details |= set() if bits[part]["symmetric"] else {f"{part} asymmetric"}
    if min(bits["attention"]["k"], bits["attention"]["v"]) < 16:
        clip = bits["attention"].get("kv_clip_ratio", 1.0)  # older records have none
        details |= {f"kv clip={clip:g}"} if clip < 1 else set()
        details |= set() if bits["attention"].get("kv_symmetric", True) else {"kv asymmetric"}
        details |= {"kv at commit"} if bits["attention"].get("kv_at", "read") == "commit" else set()
    widths = f"w{bits['weights']['bits']}a{bits['activations']['bits']}"
    name = bits["name"] if bits["name"] == widths else f"{bits['name']} ({widths})"
    return name + (f" [{', '.join(sorted(details))}]" if details else "")


FULL_PRECISION = BitsSpec(name="w16a16", weights=WeightSpec(bits=16), activations=ActivationSpec(bits=16))
