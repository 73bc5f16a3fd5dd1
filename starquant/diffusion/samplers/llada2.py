"""LLaDA2's samplers: 2.0 commits what is sure, 2.1 drafts and edits.

The masks are the true block-causal ones of the reports and the serving engines (2.1's published generate() adds 0 and 1
to the scores instead), greedy tokens are the argmax, and no loop runs for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from starquant.diffusion.samplers.base import validate_not_negative, validate_positive
from starquant.diffusion.samplers.blocks import BlockSampler, even_shares, validate_threshold
from starquant.diffusion.samplers.canvas import Canvas, Look
from starquant.diffusion.samplers.scheduled_blocks import ScheduledBlockSampler
from starquant.diffusion.sampling import commit, surest
from starquant.diffusion.special_tokens import eos_token_id


@dataclass(frozen=True)
class LLaDA2Sampler(ScheduledBlockSampler):
    """LLaDA2.0's sampler.

    Attributes:
        steps_per_block: denoising steps of a block, at most; at most gen_length // minimal_topk.
        threshold: places above it are committed where these are not fewer than the step's share.
        minimal_topk: tokens a step, at least, of the whole answer.
        eos_early_stop: end as soon as an end-of-text is committed and nothing in front of it is masked.
        eos_id: None for the model's end-of-text.

    Raises:
        ConfigError: as `ScheduledBlockSampler`; numbers below 1.
    """

    minimal_topk: int = 1
    eos_early_stop: bool = False
    eos_id: int | None = None
    name: ClassVar[str] = "llada2"
    OWN_BLOCK: ClassVar[int] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_positive(self, "minimal_topk")

    def fill(self, look: Look, canvas: Canvas, inside_BC: Tensor) -> Iterator[None]:
        """Commit what is sure, and a scheduled number of places a step at least."""
        ids_BC, steps = canvas.ids_BC, max(1, min(self.steps_per_block, self.gen_length // self.minimal_topk))
        for share in even_shares(self.block_length, steps):
            masked_BC = inside_BC & (ids_BC == look.predict.mask_id) & ~canvas.finished_B[:, None]
            rows, columns = masked_BC.nonzero(as_tuple=True)
            if not len(rows):
                return
            token, probability = look.at((rows, columns))
            chosen = surest((rows, columns), probability, ids_BC.shape, self.threshold, share)
            commit(ids_BC, (rows, columns), token, chosen)
            if self.eos_early_stop:
                ended = chosen & (token == _eos(self.eos_id, look))
                ended_B = torch.bincount(rows[ended], minlength=len(ids_BC)) > 0
                canvas.finished_B |= ended_B & ~self._masked_before_eos(look, canvas)
            yield

    def finished(self, look: Look, canvas: Canvas) -> Tensor:
        """Return which rows have generated an end-of-text."""
        return _ends(self.eos_id, look, canvas).any(1)

    def _masked_before_eos(self, look: Look, canvas: Canvas) -> Tensor:
        """Return which rows have a mask in front of their first end-of-text, [B]."""
        behind_BC = _ends(self.eos_id, look, canvas).cumsum(1) > 0
        return ((canvas.ids_BC == look.predict.mask_id) & ~behind_BC).any(1)


@dataclass(frozen=True)
class LLaDA21Sampler(BlockSampler):
    """LLaDA2.1's sampler: masked places of a block are filled, and tokens of it replaced where another is sure.

    A block takes at most its length and `max_post_steps` + 1 steps: each step fills a mask, or all are filled.

    Attributes:
        threshold: masked places above it are filled.
        editing_threshold: places above it are replaced where the token is another.
        max_post_steps: steps that only edit.
        num_to_transfer: masked places that a step fills at least.
        eos_early_stop: end after a block where an end-of-text is there and no mask.
        eos_id: None for the model's end-of-text.

    Raises:
        ConfigError: as `BlockSampler`; numbers below 1, a threshold outside (0, 1], an editing one outside [0, 1].
    """

    threshold: float = 0.95
    editing_threshold: float = 0.9
    max_post_steps: int = 16
    num_to_transfer: int = 1
    eos_early_stop: bool = False
    eos_id: int | None = None
    name: ClassVar[str] = "llada2_1"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_positive(self, "num_to_transfer")
        validate_not_negative(self, "max_post_steps")
        validate_threshold(self, "threshold")
        validate_threshold(self, "editing_threshold", least_allowed=True)

    @classmethod
    def of_length(
        cls, length: int, steps: int | None = None, block_length: int | None = None, temperature: float = 0.0
    ) -> LLaDA21Sampler:
        """Return a sampler of answers of `length` tokens; `steps` has no effect, as in the published code."""
        return cls(length, 32 if block_length is None else block_length, temperature)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Denoising steps of the answer, at most."""
        return (-(-self.gen_length // self.block_length) + 1) * (self.block_length + self.max_post_steps + 1)

    def fill(self, look: Look, canvas: Canvas, inside_BC: Tensor) -> Iterator[None]:
        """Draft and edit, both from one pass."""
        ids_BC, shape = canvas.ids_BC, canvas.ids_BC.shape
        active_B, post_B = inside_BC.any(1), torch.zeros_like(canvas.prompt_B)
        while True:
            masked_BC = inside_BC & (ids_BC == look.predict.mask_id)
            filled_B = ~masked_BC.any(1)
            post_B = post_B + filled_B.long()
            active_B = active_B & ~(filled_B & (post_B > self.max_post_steps))
            if not bool(active_B.any()):
                return
            rows, columns, token, probability = look(inside_BC & canvas.answer() & active_B[:, None])
            masked_N = masked_BC[rows, columns]
            places = rows[masked_N], columns[masked_N]
            chosen = masked_N.clone()
            chosen[masked_N] = surest(places, probability[masked_N], shape, self.threshold, self.num_to_transfer)
            edited = ~masked_N & (probability > self.editing_threshold) & (token != ids_BC[rows, columns])
            written = chosen | edited
            ids_BC[rows[written], columns[written]] = token[written]
            edited_B = torch.bincount(rows[edited], minlength=len(ids_BC)) > 0
            active_B = active_B & ~(filled_B & ~edited_B)
            yield

    def finished(self, look: Look, canvas: Canvas) -> Tensor:
        """Return which rows end early: they hold an end-of-text, and no mask in the blocks so far."""
        if not self.eos_early_stop:
            return torch.zeros_like(canvas.finished_B)
        return _ends(self.eos_id, look, canvas).any(1)


def _eos(eos_id: int | None, look: Look) -> int:
    return eos_token_id(look.predict.config) if eos_id is None else eos_id


def _ends(eos_id: int | None, look: Look, canvas: Canvas) -> Tensor:
    """Return where end-of-texts stand behind the prompts, [B, C]."""
    return (canvas.ids_BC == _eos(eos_id, look)) & canvas.answer()
