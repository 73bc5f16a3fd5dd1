"""Number formats as small frozen types: how many bits, which grid, what shares a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starquant.errors import ConfigError


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of activations: x [..., L, D] has scales [..., L, 1]."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel of a weight: W [out, in] has scales [out, 1]."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` inputs of an output channel: W [out, in] has scales [out, in / size, 1]."""

    size: int


Granularity = PerToken | PerChannel | PerGroup

#: Block types of llama.cpp (ggml) that a grid may follow, and the numbers that share a scale in them.
Block = Literal["q4_0", "q8_0"]
BLOCK_SIZE = 32


@dataclass(frozen=True)
class QuantFormat:
    """A uniform integer grid.

    Attributes:
        bits: 2 to 8, or 16 for "left at full precision".
        symmetric: grid of -2^(b-1) .. 2^(b-1) - 1 around zero; else 0 .. 2^b - 1 with an integer zero point.
        granularity: what shares a scale.
        clip_ratio: share of the largest magnitude that the grid covers.
        block: whose scales it has, rounded to float16. "q4_0": m / qmin for the number m of largest magnitude, which
            is then a code, whatever its sign; "q8_0": |m| / qmax, rounded once the codes are made. None for float32
            scales |m| / qmax.

    Raises:
        ConfigError: bits, clip ratio or granularity out of range.
    """

    bits: int
    symmetric: bool
    granularity: Granularity
    clip_ratio: float = 1.0
    block: Block | None = None

    def __post_init__(self) -> None:
        if self.bits != 16 and not 2 <= self.bits <= 8:
            raise ConfigError(f"bits: got {self.bits}, allowed: 2 to 8, or 16 for full precision")
        if not 0.0 < self.clip_ratio <= 1.0:
            raise ConfigError(f"clip_ratio: got {self.clip_ratio}, allowed: above 0, at most 1")
        width = {"q4_0": 4, "q8_0": 8}.get(self.block or "", self.bits)
        runs = self.granularity == PerGroup(BLOCK_SIZE) and self.symmetric
        if self.block is not None and (self.bits not in (width, 16) or not runs):
            raise ConfigError(f"block: got {self.block}, allowed: {width} symmetric bits in groups of {BLOCK_SIZE}")

    @property
    def quantizes(self) -> bool:
        """Whether anything is rounded."""
        return self.bits < 16

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1
