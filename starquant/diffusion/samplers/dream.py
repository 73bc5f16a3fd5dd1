"""Dream's sampler (diffusion_generate): the whole answer at once, along a grid of times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

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
from starquant.diffusion.sampling import commit, joined, rowwise_uniform, sample_dream, top_ranked
from starquant.errors import ConfigError, nearest


@dataclass(frozen=True)
class DreamSampler(Sampler):
    """Dream's sampler over the whole answer at once.

    Attributes:
        steps: denoising steps.
        max_new_tokens: tokens of the answer.
        alg: what commits a token: "maskgit_plus" (probability), "entropy", "topk_margin", or "origin" (chance).
        eps: end of the time grid from 1 to eps.
        temperature: 0 is greedy.
        top_p: nucleus, None for all.
        top_k: candidates, None for all. Left unset, the reference samples from 50 (transformers' default
            reaches its sampler), which changes confidences even at temperature 0.
        alg_temp: temperature of the choice of positions, None to take the surest.

    Raises:
        ConfigError: unknown alg, values out of range.
    """

    steps: int
    max_new_tokens: int
    alg: str = "entropy"
    eps: float = 1e-3
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = 50
    alg_temp: float | None = None
    name: ClassVar[str] = "dream"
    ALGS: ClassVar[tuple[str, ...]] = ("entropy", "maskgit_plus", "origin", "topk_margin")

    def __post_init__(self) -> None:
        validate_positive(self, "steps", "max_new_tokens")
        validate_not_negative(self, "temperature")
        if not 0.0 < self.eps < 1.0:
            raise ConfigError(f"eps: got {self.eps}, allowed: between 0 and 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p: got {self.top_p}, allowed: above 0, at most 1, or null")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: got {self.top_k}, allowed: 1 or more, or null")
        if self.alg not in self.ALGS:
            raise ConfigError(f"alg: got '{self.alg}', allowed: {', '.join(self.ALGS)}.{nearest(self.alg, self.ALGS)}")

    @classmethod
    def of_length(
        cls, length: int, steps: int | None = None, block_length: int | None = None, temperature: float = 0.0
    ) -> DreamSampler:
        """Return a sampler of answers of `length` tokens; see `Sampler.of_length`."""
        if block_length is not None:
            raise ConfigError("block_length: Dream fills the whole answer at once; allowed with LLaDA only")
        return cls(length if steps is None else steps, length, temperature=temperature)

    @property
    def answer_length(self) -> int:
        """Tokens that `generate` appends to the prompt."""
        return self.max_new_tokens

    @property
    def draws(self) -> bool:
        """Tokens are sampled, or positions drawn."""
        return self.temperature > 0 or self.commits_by_chance

    @property
    def commits_by_chance(self) -> bool:
        """Positions are drawn, evenly or by a temperature."""
        return self.alg == "origin" or bool(self.alg_temp)

    def by_probability(self) -> DreamSampler:
        """Return the same sampler with the tokens' probabilities as its confidences."""
        return replace(self, alg="maskgit_plus")

    def denoise(self, predict: MaskPredictor, state: DenoisingState) -> None:
        """Fill all masked positions along the time grid.

        The reference derives the number of tokens a step from the batch's mean mask count; it is counted per
        row here, which is the same where rows are alike and does not mix requests where they are not.
        """
        ids = state.ids_BL
        for step in range(self.steps):
            masked_B = (ids == predict.mask_id).sum(1)
            self.advance(predict, state, step, self._share_of(masked_B, self._shares()[step].item()))
            if state.on_step is not None:
                state.on_step(step, ids, None)

    def commits(self, step_B: Tensor, masked_B: Tensor) -> Tensor:
        """Return how many of its masked tokens each row commits at its step."""
        return self._share_of(masked_B, self._shares().to(step_B.device)[step_B])

    @staticmethod
    def _share_of(masked_B: Tensor, share: Tensor | float) -> Tensor:
        return (masked_B.float() * share).long()

    def advance(self, predict: MaskPredictor, state: DenoisingState, step: int | Tensor, commit_B: Tensor) -> None:
        """Take one step from any state: commit `commit_B` tokens of each row, by chance under alg "origin".

        `step` is one for all rows, or one a row [B].
        """
        ids = state.ids_BL
        rows, columns = (ids == predict.mask_id).nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        token, confidence = self.candidates(predict, state, (rows, columns))
        if self.alg == "origin":
            step_B = torch.as_tensor(step)
            share_B = self._shares().to(step_B.device)[step_B].to(ids.device).expand(len(ids))
            chosen = rowwise_uniform(rows, state.generators) < share_B[rows]
        else:
            if self.alg_temp:  # Gumbel top-k: sampling without replacement from softmax(confidence / alg_temp)
                noise = rowwise_uniform(rows, state.generators).clamp_min(1e-300)
                confidence = confidence / self.alg_temp - (-noise.log()).log()
            chosen = top_ranked(confidence, rows, columns, ids.shape, commit_B)
        commit(ids, (rows, columns), token, chosen)

    def candidates(
        self,
        predict: MaskPredictor,
        state: DenoisingState,
        at: Positions,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (token [N], confidence [N]) for masked positions."""
        u_N = rowwise_uniform(at[0], state.generators) if self.temperature else None
        drawn = [
            sample_dream(
                logits_NV, self.alg, self.temperature, self.top_p, self.top_k, None if u_N is None else u_N[part]
            )
            for part, logits_NV in predict.chunks(state.ids_BL, at, visible_BL=state.visible_BL, cache=cache)
        ]
        return joined([token for token, _ in drawn]), joined([confidence for _, confidence in drawn])

    def _shares(self) -> Tensor:
        """Return the share of the masked tokens that each step commits: all at the last one."""
        times = torch.linspace(1, self.eps, self.steps + 1)
        share = 1 - times[1:] / times[:-1]
        share[-1] = 1.0
        return share
