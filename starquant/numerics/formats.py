"""Number formats as small frozen types: how many bits, which grid, what shares a scale."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class QuantFormat:
    """A uniform integer grid.

    Attributes:
        bits: 2 to 8, or 16 for "left at full precision".
        symmetric: grid of -2^(b-1) .. 2^(b-1) - 1 around zero; else 0 .. 2^b - 1 with an integer zero point.
        granularity: what shares a scale.
        clip_ratio: share of the largest magnitude that the grid covers.

    Raises:
        ConfigError: bits or clip ratio out of range.
    """

    bits: int
    symmetric: bool
    granularity: Granularity
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.bits != 16 and not 2 <= self.bits <= 8:
            raise ConfigError(f"bits: got {self.bits}, allowed: 2 to 8, or 16 for full precision")
        if not 0.0 < self.clip_ratio <= 1.0:
            raise ConfigError(f"clip_ratio: got {self.clip_ratio}, allowed: above 0, at most 1")

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
