"""LLaDA's sampler (generate.py): semi-autoregressive, low-confidence or random remasking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
from starquant.diffusion.sampling import commit, joined, log_probability, rowwise_uniform, sample_tokens, top_ranked
from starquant.diffusion.special_tokens import end_token_ids, eos_token_ids
from starquant.errors import ConfigError, nearest


@dataclass(frozen=True)
class LLaDASampler(Sampler):
    """Semi-autoregressive sampling with low-confidence or random remasking.

    Attributes:
        steps: denoising steps over the whole answer, shared equally by the blocks.
        gen_length: tokens of the answer.
        block_length: tokens of a block; blocks are filled from left to right.
        temperature: of the sampled tokens; 0 is greedy.
        cfg_scale: classifier-free guidance.
        remasking: "low_confidence" commits the surest tokens, "random" any.
        logits_eos_inf: never predict EOS (official option for code).
        confidence_eos_eot_inf: commit EOS and end-of-turn last (official option for LLaDA-1.5).

    Raises:
        ConfigError: lengths or steps that do not divide, unknown remasking, negative values.
    """

    steps: int
    gen_length: int
    block_length: int
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    name: ClassVar[str] = "llada"
    REMASKING: ClassVar[tuple[str, ...]] = ("low_confidence", "random")

    def __post_init__(self) -> None:
        validate_positive(self, "steps", "gen_length", "block_length")
        validate_not_negative(self, "temperature", "cfg_scale")
        if self.gen_length % self.block_length:
            raise ConfigError(f"block_length: got {self.block_length}, must divide gen_length = {self.gen_length}")
        if self.steps % self.blocks:
            raise ConfigError(f"steps: got {self.steps}, must be a multiple of the {self.blocks} blocks")
        if self.remasking not in self.REMASKING:
            raise ConfigError(
                f"remasking: got '{self.remasking}', allowed: {', '.join(self.REMASKING)}."
                + nearest(self.remasking, self.REMASKING)
            )

    @classmethod
    def of_length(
        cls, length: int, steps: int | None = None, block_length: int | None = None, temperature: float = 0.0
    ) -> LLaDASampler:
        """Return a sampler of answers of `length` tokens; see `Sampler.of_length`."""
        steps = length if steps is None else steps
        return cls(steps, length, length if block_length is None else block_length, temperature)

    @property
    def own_block_length(self) -> int:
        """Tokens of a block."""
        return self.block_length

    @property
    def draws(self) -> bool:
        """Tokens are sampled, or positions drawn."""
        return self.temperature > 0 or self.remasking == "random"

    @property
    def commits_by_chance(self) -> bool:
        """Positions are drawn."""
        return self.remasking == "random"

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.gen_length // self.block_length

    @property
    def answer_length(self) -> int:
        """Tokens that `generate` appends to the prompt."""
        return self.gen_length

    @property
    def branches(self) -> int:
        """Rows of a forward pass for each sequence: guidance runs two."""
        return 1 if self.cfg_scale == 0.0 else 2

    def denoise(self, predict: MaskPredictor, state: DenoisingState) -> None:
        """Fill the answer block by block."""
        ids = state.ids_BL
        steps = self.steps // self.blocks
        for block in range(self.blocks):
            end = state.prompt_length + (block + 1) * self.block_length
            masked_B = (ids[:, end - self.block_length : end] == predict.mask_id).sum(1)
            for step in range(steps):
                self.advance(predict, state, block * steps + step, self._share(step, masked_B))
                if state.on_step is not None:
                    state.on_step(block * steps + step, ids, None)

    def commits(self, step_B: Tensor, masked_B: Tensor) -> Tensor:
        """Return how many tokens each row commits at its step, of an answer that was masked as a whole."""
        steps = self.steps // self.blocks
        return self._share(step_B % steps, torch.full_like(step_B, self.block_length))

    def _share(self, step: int | Tensor, masked_B: Tensor) -> Tensor:
        """Return how many of a block's masked tokens are committed at its `step`: as even as can be, more first."""
        steps = self.steps // self.blocks
        return masked_B // steps + (step < masked_B % steps)

    def advance(self, predict: MaskPredictor, state: DenoisingState, step: int | Tensor, commit_B: Tensor) -> None:
        """Take one step from any state: commit `commit_B` tokens of each row, up to the end of the step's block.

        `step` is one for all rows, or one a row [B].
        """
        ids, steps = state.ids_BL, self.steps // self.blocks
        end = state.prompt_length + (step // steps + 1) * self.block_length
        if isinstance(end, int):
            masked_BL = ids[:, :end] == predict.mask_id
        else:
            reached_BL = torch.arange(ids.shape[1], device=ids.device) < end.reshape(-1, 1)
            masked_BL = (ids == predict.mask_id) & reached_BL
        rows, columns = masked_BL.nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        token, confidence = self.candidates(predict, state, (rows, columns))
        commit(ids, (rows, columns), token, top_ranked(confidence, rows, columns, ids.shape, commit_B))

    def candidates(
        self,
        predict: MaskPredictor,
        state: DenoisingState,
        at: Positions,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (token [N], confidence [N]) for masked positions."""
        rows, eos = at[0], list(eos_token_ids(predict.config))
        ends = list(end_token_ids(predict.config)) if self.confidence_eos_eot_inf else []
        u_N = rowwise_uniform(rows, state.generators) if self.temperature else None
        tokens, confidences = [], []
        settings: dict[str, Any] = {"cfg_scale": self.cfg_scale, "prompt_BL": state.prompt_BL, "cache": cache}
        for part, logits_NV in predict.chunks(state.ids_BL, at, visible_BL=state.visible_BL, **settings):
            if self.logits_eos_inf:
                logits_NV[:, eos] = -torch.inf
            tokens.append(sample_tokens(logits_NV, self.temperature, None if u_N is None else u_N[part]))
            if self.confidence_eos_eot_inf:
                logits_NV[:, ends] = -torch.inf
            confidences.append(log_probability(logits_NV, tokens[-1]).exp())
        if self.remasking == "random":
            return joined(tokens), rowwise_uniform(rows, state.generators)
        return joined(tokens), joined(confidences)
