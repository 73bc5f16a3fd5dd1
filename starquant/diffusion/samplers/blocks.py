"""Block diffusion: blocks of positions are filled one after another, each behind committed ones.

Blocks count from a row's first real token, prompt included, so that the first block that is filled may begin with the
end of the prompt. A batch fills its rows' blocks side by side; each row takes the steps that it would take alone.

Shape suffixes: B rows, C columns of the canvas: up to the end of every row's last block, N selected positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
from starquant.diffusion.sampling import rowwise_uniform, sample_tokens, top_ranked
from starquant.errors import ConfigError


@dataclass
class Canvas:
    """A batch whose answers consist of whole blocks.

    Attributes:
        ids_BC: prompt and answer, changed in place; behind the answer [MASK].
        visible_BC: False on padding, None without.
        position_BC: of every token in its row; negative on padding.
        prompt_B: tokens of each row's prompt.
        end_B: tokens up to the end of each row's last block.
        block_length: tokens of a block.
        blocks: that are filled, of the row that has most of them.
        finished_B: rows that are done though they have masks.
        generators: one a row.
    """

    ids_BC: Tensor
    visible_BC: Tensor | None
    position_BC: Tensor
    prompt_B: Tensor
    end_B: Tensor
    block_length: int
    blocks: int
    finished_B: Tensor
    generators: list[torch.Generator]

    @classmethod
    def of(cls, state: DenoisingState, sampler: BlockSampler, mask_id: int) -> Canvas:
        """Return the canvas of a batch."""
        ids_BL, visible_BL, length = state.ids_BL, state.visible_BL, sampler.block_length
        rows, columns = ids_BL.shape
        prompt_B = ids_BL.new_full((rows,), state.prompt_length)
        if visible_BL is not None:
            prompt_B = visible_BL[:, : state.prompt_length].sum(1)
        padding_B, end_B = state.prompt_length - prompt_B, -(-(prompt_B + sampler.gen_length) // length) * length
        behind = max(0, int((padding_B + end_B).max()) - columns)
        ids_BC = torch.cat((ids_BL, ids_BL.new_full((rows, behind), mask_id)), 1)
        visible_BC = None
        if visible_BL is not None:
            visible_BC = torch.cat((visible_BL, visible_BL.new_ones(rows, behind)), 1)
        position_BC = torch.arange(columns + behind, device=ids_BL.device) - padding_B[:, None]
        blocks = int((end_B // length - prompt_B // length).max())
        finished_B = torch.zeros(rows, dtype=torch.bool, device=ids_BL.device)
        return cls(ids_BC, visible_BC, position_BC, prompt_B, end_B, length, blocks, finished_B, state.generators)

    def block(self, number_B: int | Tensor) -> Tensor:
        """Return where each row's block of a number is, [B, C]; number 0 may hold the end of the prompt.

        Rows whose last block stands in front of it have none.
        """
        first_B1 = (self.prompt_B // self.block_length + number_B)[:, None] * self.block_length
        stop_B1 = torch.minimum(first_B1 + self.block_length, self.end_B[:, None])
        return (self.position_BC >= first_B1) & (self.position_BC < stop_B1)

    def answer(self) -> Tensor:
        """Return what stands behind the prompts, [B, C]."""
        return self.position_BC >= self.prompt_B[:, None]


@dataclass
class Look:
    """One pass of the model over the canvas, up to a block's end.

    Attributes:
        predict: of the model.
        canvas: that is looked at.
        temperature: of the sampled tokens.
        cache: of committed blocks, None for none; it needs a block.
        block: that every row fills, counted from the first column of a canvas without padding; None to read it off the
            places that are asked for.
        rows_N: row of each place that the last pass was asked for.
    """

    predict: MaskPredictor
    canvas: Canvas
    temperature: float
    cache: Any = None
    block: int | None = None
    rows_N: Tensor | None = None

    def __call__(self, at_BC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (rows, columns, token, its probability) [N] of some places; [MASK] is no token."""
        rows, columns = at_BC.nonzero(as_tuple=True)
        token, probability = self.at((rows, columns))
        return rows, columns, token, probability

    def at(self, at: Positions) -> tuple[Tensor, Tensor]:
        """Return (token [N], probability [N]) at positions; the pass computes what stands before their blocks' ends."""
        canvas, self.rows_N = self.canvas, at[0]
        stop, visible_BC = self._seen(at)
        u_N = rowwise_uniform(at[0], canvas.generators) if self.temperature else None
        drawn = []
        for part, logits_NV in self.predict.chunks(
            canvas.ids_BC[:, :stop], at, visible_BL=visible_BC, cache=self.cache
        ):
            if self.temperature:
                logits_NV = logits_NV / self.temperature
            probability_NV = logits_NV.softmax(1)
            logits_NV[:, self.predict.mask_id] = -torch.inf  # what is committed is a token
            token_N = sample_tokens(logits_NV, float(self.temperature > 0), None if u_N is None else u_N[part])
            drawn.append((token_N, probability_NV.gather(1, token_N[:, None])[:, 0]))
        if len(drawn) == 1:
            return drawn[0]
        return torch.cat([token for token, _ in drawn]), torch.cat([p for _, p in drawn])

    def _seen(self, at: Positions) -> tuple[int, Tensor | None]:
        """Return the end of the columns that a pass computes for places, and which of them are there [B, C]."""
        canvas, length = self.canvas, self.canvas.block_length
        if self.block is not None:  # known without asking the device
            start, stop = self.block * length, (self.block + 1) * length
            if self.cache is not None:
                self.cache.ahead(start, stop)
            return stop, None
        block_N = canvas.position_BC[at] // length
        stop = int((at[1] + (block_N + 1) * length - canvas.position_BC[at]).max())
        if canvas.visible_BC is None:
            return stop, None
        # rows' blocks end at other columns: nothing is there behind its own
        end_B1 = torch.zeros_like(canvas.prompt_B).scatter_reduce_(0, at[0], block_N + 1, "amax")[:, None]
        inside_BC = canvas.position_BC < torch.where(end_B1 > 0, end_B1 * length, stop)
        return stop, (canvas.visible_BC & inside_BC)[:, :stop]


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

    def behind(self, prompt_length: int) -> int:
        """Return how many places of the last block stand behind the answer to a prompt."""
        return -(prompt_length + self.gen_length) % self.block_length

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
        canvas, steps = Canvas.of(state, self, predict.mask_id), 0
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
                        assert look.rows_N is not None
                        stepped_B = torch.bincount(look.rows_N, minlength=len(canvas.ids_BC)) > 0
                        state.on_step(steps, state.ids_BL, stepped_B)
                    steps += 1
            canvas.finished_B |= self.finished(look, canvas)
            yield canvas
            if bool(canvas.finished_B.all()):
                return

    def commits(self, step_B: Tensor, masked_B: Tensor) -> Tensor:
        """Return how many tokens each row commits at the least: one, while it has masks."""
        return masked_B.clamp_max(1)

    def advance(self, predict: MaskPredictor, state: DenoisingState, step: int | Tensor, commit_B: Tensor) -> None:
        """Take one step from any state: commit the `commit_B` surest tokens of each row's first block with masks."""
        canvas = Canvas.of(state, self, predict.mask_id)
        masked_BC = (canvas.ids_BC == predict.mask_id) & canvas.answer()
        first_B = masked_BC.int().argmax(1)
        position_B = canvas.position_BC[torch.arange(len(first_B), device=first_B.device), first_B]
        number_B = position_B // self.block_length - canvas.prompt_B // self.block_length
        with predict.model.blocks_of(self.block_length):
            rows, columns, token, probability = Look(predict, canvas, self.temperature)(
                masked_BC & canvas.block(number_B)
            )
        chosen = top_ranked(probability, rows, columns, canvas.ids_BC.shape, commit_B)
        canvas.ids_BC[rows[chosen], columns[chosen]] = token[chosen]
        state.ids_BL.copy_(canvas.ids_BC[:, : state.ids_BL.shape[1]])

    def candidates(
        self, predict: MaskPredictor, state: DenoisingState, at: Positions, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (token [N], probability [N]) for masked positions."""
        with predict.model.blocks_of(self.block_length):
            return Look(predict, Canvas.of(state, self, predict.mask_id), self.temperature).at(at)


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
