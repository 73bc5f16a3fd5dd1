"""Samplers of block diffusion that share a block's places among a number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from starquant.diffusion.samplers.base import validate_positive
from starquant.diffusion.samplers.blocks import BlockSampler, validate_threshold


@dataclass(frozen=True)
class ScheduledBlockSampler(BlockSampler):
    """What samplers share that take so many steps a block at most.

    Attributes:
        steps_per_block: denoising steps of a block, at most.
        threshold: of the probability above which a place is sure.

    Raises:
        ConfigError: as `BlockSampler`; fewer than one step, a threshold outside (0, 1].
    """

    steps_per_block: int = 32
    threshold: float = 0.95
    #: Tokens of a block that a family is published with.
    OWN_BLOCK: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_positive(self, "steps_per_block")
        validate_threshold(self, "threshold")

    @classmethod
    def of_length(
        cls, length: int, steps: int | None = None, block_length: int | None = None, temperature: float = 0.0
    ) -> ScheduledBlockSampler:
        """Return a sampler of answers of `length` tokens; see `Sampler.of_length`."""
        block_length = cls.OWN_BLOCK if block_length is None else block_length
        blocks = -(-length // block_length)
        own = block_length if steps is None else max(1, steps // blocks)
        return cls(length, block_length, temperature, steps_per_block=own)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Denoising steps of the answer, at most."""
        return (-(-self.gen_length // self.block_length) + 1) * min(self.steps_per_block, self.block_length)
