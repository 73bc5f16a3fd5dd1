"""A batch of block diffusion under way: its canvas of whole blocks, and the passes that look at it.

Shape suffixes: B rows, C columns of the canvas: up to the end of every row's last block, N selected positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.diffusion.predictor import MaskPredictor
from starquant.diffusion.samplers.base import DenoisingState, Positions
from starquant.diffusion.sampling import joined, rowwise_uniform, sample_tokens


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
    def of(cls, state: DenoisingState, answer: int, length: int, mask_id: int) -> Canvas:
        """Return the canvas of a batch whose answers have so many tokens, and its blocks a length."""
        ids_BL, visible_BL = state.ids_BL, state.visible_BL
        rows, columns = ids_BL.shape
        prompt_B = ids_BL.new_full((rows,), state.prompt_length)
        if visible_BL is not None:
            prompt_B = visible_BL[:, : state.prompt_length].sum(1)
        padding_B, end_B = state.prompt_length - prompt_B, -(-(prompt_B + answer) // length) * length
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

    def stepped(self) -> Tensor | None:
        """Return which rows the last pass was made for, [B]; None before any."""
        rows = len(self.canvas.ids_BC)
        return None if self.rows_N is None else torch.bincount(self.rows_N, minlength=rows) > 0

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
        return joined([token for token, _ in drawn]), joined([p for _, p in drawn])

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
