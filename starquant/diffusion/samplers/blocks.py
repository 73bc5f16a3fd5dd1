"""Block diffusion: blocks of positions are filled one after another, each behind committed ones.

Blocks count from a row's first real token, prompt included, so that the first block that is filled may begin with the
end of the prompt. A batch fills its rows' blocks side by side; each row takes the steps that it would take alone.

Shape suffixes: B rows, C columns of the canvas: up to the end of every row's last block, N selected positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.diffusion.predictor import Cache, MaskPredictor
from starquant.diffusion.samplers.base import (
    DenoisingState,
    Positions,
    Sampler,
    validate_not_negative,
    validate_positive,
)
from starquant.diffusion.samplers.canvas import Canvas, Look
from starquant.diffusion.sampling import commit, top_ranked
from starquant.errors import ConfigError


def even_shares(length: int, steps: int) -> list[int]:
    """Return how many of a block's places each step commits: as even as can be, more first."""
    return [length // steps + (step < length % steps) for step in range(steps)]


@dataclass(frozen=True)
class BlockSampler(Sampler):
    """What the samplers of block diffusion share.

    Attributes:
        gen_length: tokens of the answer; its last block may reach beyond it.
        block_length: tokens of a block.
        temperature: of the sampled tokens; 0 is greedy.
        cache: keep keys and values of committed blocks, where no row is padded; tokens are the same without.

    Raises:
        ConfigError: lengths below 1, a negative temperature.
    """

    gen_length: int
    block_length: int
    temperature: float = 0.0
    cache: bool = True

    def __post_init__(self) -> None:
        validate_positive(self, "gen_length", "block_length")
        validate_not_negative(self, "temperature")

    @property
    def own_block_length(self) -> int:
        """Tokens of a block."""
        return self.block_length

    @property
    def answer_length(self) -> int:
        """Tokens that `generate` appends to the prompt."""
        return self.gen_length

    @property
    def draws(self) -> bool:
        """Tokens are sampled."""
        return self.temperature > 0

    @property
    def commits_by_chance(self) -> bool:
        """Places are chosen by confidence."""
        return False

    def reach(self, answer_BG: Tensor, prompt_B: Tensor, mask_id: int) -> Tensor | None:
        """Return each row's first block with masks, [B, G]; of one that reaches beyond the answer nothing.

        What such a block holds behind the answer is no part of the state.
        """
        block_BG = (prompt_B[:, None] + torch.arange(answer_BG.shape[1])) // self.block_length
        first_B1 = (answer_BG == mask_id).int().argmax(1, keepdim=True)
        whole_B1 = ((prompt_B + answer_BG.shape[1]) // self.block_length)[:, None]
        return (block_BG == block_BG.gather(1, first_B1)) & (block_BG < whole_B1)

    @abstractmethod
    def fill(self, look: Look, canvas: Canvas, inside_BC: Tensor) -> Iterator[None]:
        """Fill one block of every row, `inside_BC`; yields after every step."""

    @abstractmethod
    def finished(self, look: Look, canvas: Canvas) -> Tensor:
        """Return which rows are done after a block, [B]."""

    def denoise(self, predict: MaskPredictor, state: DenoisingState) -> None:
        """Fill the answer block by block."""
        for _ in self.blockwise(predict, state):
            pass

    def blockwise(self, predict: MaskPredictor, state: DenoisingState) -> Iterator[Canvas]:
        """Fill the answer, and yield the canvas after every block.

        Raises:
            ConfigError: a model whose attention is not block-causal; blocks longer than its context.
        """
        validate_blocks(predict, self.block_length)
        canvas, steps = self.canvas(state, predict), 0
        caches = self.cache and predict.caches and canvas.visible_BC is None
        kept = predict.model.committed_cache(canvas.ids_BC.shape[1]) if caches else None
        look = Look(predict, canvas, self.temperature, kept)
        for number in range(canvas.blocks):
            if canvas.visible_BC is None:
                look.block = state.prompt_length // self.block_length + number
            with predict.model.blocks_of(self.block_length):
                for _ in self.fill(look, canvas, canvas.block(number) & ~canvas.finished_B[:, None]):
                    state.ids_BL.copy_(canvas.ids_BC[:, : state.ids_BL.shape[1]])
                    if state.on_step is not None:
                        state.on_step(steps, state.ids_BL, look.stepped())
                    steps += 1
            canvas.finished_B |= self.finished(look, canvas)
            yield canvas
            if bool(canvas.finished_B.all()):
                return

    def canvas(self, state: DenoisingState, predict: MaskPredictor) -> Canvas:
        """Return the canvas of a batch."""
        return Canvas.of(state, self.gen_length, self.block_length, predict.mask_id)

    def commits(self, step_B: Tensor, masked_B: Tensor) -> Tensor:
        """Return how many tokens each row commits at the least: one, while it has masks."""
        return masked_B.clamp_max(1)

    def advance(self, predict: MaskPredictor, state: DenoisingState, step: int | Tensor, commit_B: Tensor) -> None:
        """Take one step from any state: commit the `commit_B` surest tokens of each row's first block with masks."""
        canvas = self.canvas(state, predict)
        masked_BC = (canvas.ids_BC == predict.mask_id) & canvas.answer()
        first_B = masked_BC.int().argmax(1)
        position_B = canvas.position_BC[torch.arange(len(first_B), device=first_B.device), first_B]
        number_B = position_B // self.block_length - canvas.prompt_B // self.block_length
        with predict.model.blocks_of(self.block_length):
            rows, columns, token, probability = Look(predict, canvas, self.temperature)(
                masked_BC & canvas.block(number_B)
            )
        chosen = top_ranked(probability, rows, columns, canvas.ids_BC.shape, commit_B)
        commit(canvas.ids_BC, (rows, columns), token, chosen)
        state.ids_BL.copy_(canvas.ids_BC[:, : state.ids_BL.shape[1]])

    def candidates(
        self, predict: MaskPredictor, state: DenoisingState, at: Positions, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (token [N], probability [N]) for masked positions."""
        with predict.model.blocks_of(self.block_length):
            return Look(predict, self.canvas(state, predict), self.temperature).at(at)


def validate_blocks(predict: MaskPredictor, block_length: int) -> None:
    """Judge a block length by a model.

    Raises:
        ConfigError: one beyond its context; a model that has no blocks.
    """
    context = predict.config.context_length
    if block_length > context:
        raise ConfigError(f"block_length: got {block_length}, allowed: 1 to the model's context of {context}")
    if not hasattr(predict.model, "blocks_of"):
        kind = type(predict.model).__name__
        raise ConfigError(f"sampler: block diffusion needs block-causal attention, {kind} has none; allowed: its own")


def validate_threshold(sampler: object, name: str, least_allowed: bool = False) -> None:
    """Raise ConfigError for a probability outside (0, 1], or below 0 where `least_allowed` lets 0 be one."""
    value = getattr(sampler, name)
    if not 0.0 <= value <= 1.0 or (value == 0.0 and not least_allowed):
        raise ConfigError(f"{name}: got {value}, allowed: {'0 to 1' if least_allowed else 'above 0, at most 1'}")
