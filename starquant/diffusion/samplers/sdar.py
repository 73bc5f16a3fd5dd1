"""SDAR's sampler (generate.py of JetAstra/SDAR), greedy confidences being those of the full softmax.

What its public code has wrong is put right: where fewer places are masked than a step should commit, only these are
(generate.py then writes arbitrary others, prompt included), and [MASK] is no token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from starquant.diffusion.samplers.blocks import even_shares
from starquant.diffusion.samplers.canvas import Canvas, Look
from starquant.diffusion.samplers.scheduled_blocks import ScheduledBlockSampler
from starquant.diffusion.sampling import commit, surest
from starquant.diffusion.special_tokens import end_token_ids
from starquant.errors import ConfigError, nearest


@dataclass(frozen=True)
class SDARSampler(ScheduledBlockSampler):
    """SDAR's sampler.

    Attributes:
        steps_per_block: denoising steps of a block, at most; shared evenly by its places.
        remasking: "sequential" commits from left to right, "low_confidence_static" the surest places,
            "low_confidence_dynamic" all places above the threshold where these are not fewer.
        threshold: of "low_confidence_dynamic"; 1 is "low_confidence_static".
        stop_ids: the answer ends with the block that holds one of them; None for the model's ends, () for none.

    Raises:
        ConfigError: as `ScheduledBlockSampler`; unknown remasking.
    """

    steps_per_block: int = 4
    remasking: str = "low_confidence_static"
    stop_ids: tuple[int, ...] | None = None
    name: ClassVar[str] = "sdar"
    OWN_BLOCK: ClassVar[int] = 4
    REMASKING: ClassVar[tuple[str, ...]] = ("low_confidence_dynamic", "low_confidence_static", "sequential")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remasking not in self.REMASKING:
            raise ConfigError(
                f"remasking: got '{self.remasking}', allowed: {', '.join(self.REMASKING)}."
                + nearest(self.remasking, self.REMASKING)
            )

    def fill(self, look: Look, canvas: Canvas, inside_BC: Tensor) -> Iterator[None]:
        """Commit a scheduled number of places a step."""
        ids_BC, shares = canvas.ids_BC, even_shares(self.block_length, self.steps_per_block)
        for share in shares:
            rows, columns = (inside_BC & (ids_BC == look.predict.mask_id)).nonzero(as_tuple=True)
            if not len(rows):
                return
            token, probability = look.at((rows, columns))
            if self.remasking == "sequential":
                probability = -columns.to(probability.dtype)
            dynamic = self.remasking == "low_confidence_dynamic"
            threshold = self.threshold if dynamic else 1.0
            chosen = surest((rows, columns), probability, ids_BC.shape, threshold, share)
            commit(ids_BC, (rows, columns), token, chosen)
            yield

    def finished(self, look: Look, canvas: Canvas) -> Tensor:
        """Return which rows hold a stop id behind the prompt."""
        stops = end_token_ids(look.predict.config) if self.stop_ids is None else self.stop_ids
        ids = torch.tensor(sorted(stops), dtype=canvas.ids_BC.dtype, device=canvas.ids_BC.device)
        return (torch.isin(canvas.ids_BC, ids) & canvas.answer()).any(1)
