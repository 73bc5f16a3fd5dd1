"""The samplers of LLaDA (generate.py) and Dream (diffusion_generate): which tokens to commit at each step.

A sampler holds settings only. `denoise` fills the masked positions of a batch in place; random draws come from
one generator a row, so that a row's tokens do not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from starquant.diffusion.predictor import Cache, MaskPredictor
from starquant.diffusion.sampling import log_probability, rowwise_uniform, sample_dream, sample_tokens, top_ranked
from starquant.errors import ConfigError, nearest

OnStep = Callable[[int, Tensor], None]
Positions = tuple[Tensor, Tensor]


@dataclass
class DenoisingState:
    """A batch being generated.

    Attributes:
        ids_BL: prompt and answer, changed in place.
        prompt_length: columns of the prompt (padding included); the answer follows.
        visible_BL: False on padding, None without.
        generators: one a row.
        on_step: called after every step with (step, ids).
        given_BL: tokens visible before the first step, which classifier-free guidance hides; `denoise` sets it.
    """

    ids_BL: Tensor
    prompt_length: int
    visible_BL: Tensor | None
    generators: list[torch.Generator]
    on_step: OnStep | None = None
    given_BL: Tensor | None = None


@dataclass(frozen=True)
class LLaDASampler:
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
    REMASKING: ClassVar[tuple[str, ...]] = ("low_confidence", "random")

    def __post_init__(self) -> None:
        _positive(self, "steps", "gen_length", "block_length")
        _not_negative(self, "temperature", "cfg_scale")
        if self.gen_length % self.block_length:
            raise ConfigError(f"block_length: got {self.block_length}, must divide gen_length = {self.gen_length}")
        if self.steps % self.blocks:
            raise ConfigError(f"steps: got {self.steps}, must be a multiple of the {self.blocks} blocks")
        if self.remasking not in self.REMASKING:
            raise ConfigError(
                f"remasking: got '{self.remasking}', allowed: {', '.join(self.REMASKING)}."
                + nearest(self.remasking, self.REMASKING)
            )

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
        state.given_BL = ids != predict.mask_id  # as the official code: what is visible at the start
        steps = self.steps // self.blocks
        for block in range(self.blocks):
            end = state.prompt_length + (block + 1) * self.block_length
            masked_B = (ids[:, end - self.block_length : end] == predict.mask_id).sum(1)
            for step in range(steps):
                self.advance(predict, state, block * steps + step, self._share(step, masked_B))
                if state.on_step is not None:
                    state.on_step(block * steps + step, ids)

    def commits(self, step_B: Tensor, masked_B: Tensor) -> Tensor:
        """Return how many tokens each row commits at its step, of an answer that was masked as a whole."""
        steps = self.steps // self.blocks
        return self._share(step_B % steps, torch.full_like(step_B, self.block_length))

    def _share(self, step: int | Tensor, masked_B: Tensor) -> Tensor:
        """Return how many of a block's masked tokens are committed at its `step`: as even as can be, more first."""
        steps = self.steps // self.blocks
        return masked_B // steps + (step < masked_B % steps)

    def idle(self, step: int, masked: int) -> bool:
        """Return whether a step commits nothing and draws nothing: it need not be computed."""
        drawn = self.temperature > 0 or self.remasking == "random"
        return not drawn and step < self.steps and int(self.commits(torch.tensor(step), torch.tensor(masked))) == 0

    def advance(self, predict: MaskPredictor, state: DenoisingState, step: int | Tensor, commit_B: Tensor) -> None:
        """Take one step from any state: commit `commit_B` tokens of each row, up to the end of the step's block.

        `step` is one for all rows, or one a row [B].
        """
        ids = state.ids_BL
        block = torch.as_tensor(step, device=ids.device) // (self.steps // self.blocks)
        end = (state.prompt_length + (block + 1) * self.block_length).reshape(-1, 1)
        reached = torch.arange(ids.shape[1], device=ids.device) < end
        rows, columns = ((ids == predict.mask_id) & reached).nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        token, confidence = self.candidates(predict, state, (rows, columns))
        chosen = top_ranked(confidence, rows, columns, ids.shape, commit_B)
        ids[rows[chosen], columns[chosen]] = token[chosen]

    def candidates(
        self,
        predict: MaskPredictor,
        state: DenoisingState,
        at: tuple[Tensor, Tensor],
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (token [N], confidence [N]) for masked positions."""
        rows, eos, eot = at[0], int(predict.config.eos_token_id), getattr(predict.config, "eot_token_id", None)
        u_N = rowwise_uniform(rows, state.generators) if self.temperature else None
        tokens, confidences = [], []
        settings: dict[str, Any] = {"cfg_scale": self.cfg_scale, "prompt_BL": state.given_BL, "cache": cache}
        for part, logits_NV in predict.chunks(state.ids_BL, at, visible_BL=state.visible_BL, **settings):
            if self.logits_eos_inf:
                logits_NV[:, eos] = -torch.inf
            tokens.append(sample_tokens(logits_NV, self.temperature, None if u_N is None else u_N[part]))
            if self.confidence_eos_eot_inf:
                logits_NV[:, [t for t in (eos, eot) if t is not None]] = -torch.inf
            confidences.append(log_probability(logits_NV, tokens[-1]).exp())
        if self.remasking == "random":
            return torch.cat(tokens), rowwise_uniform(rows, state.generators)
        return torch.cat(tokens), torch.cat(confidences)


@dataclass(frozen=True)
class DreamSampler:
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
    ALGS: ClassVar[tuple[str, ...]] = ("entropy", "maskgit_plus", "origin", "topk_margin")

    def __post_init__(self) -> None:
        _positive(self, "steps", "max_new_tokens")
        _not_negative(self, "temperature")
        if not 0.0 < self.eps < 1.0:
            raise ConfigError(f"eps: got {self.eps}, allowed: between 0 and 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p: got {self.top_p}, allowed: above 0, at most 1, or null")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: got {self.top_k}, allowed: 1 or more, or null")
        if self.alg not in self.ALGS:
            raise ConfigError(f"alg: got '{self.alg}', allowed: {', '.join(self.ALGS)}.{nearest(self.alg, self.ALGS)}")

    @property
    def answer_length(self) -> int:
        """Tokens that `generate` appends to the prompt."""
        return self.max_new_tokens

    @property
    def branches(self) -> int:
        """Rows of a forward pass for each sequence: guidance runs two."""
        return 1

    def denoise(self, predict: MaskPredictor, state: DenoisingState) -> None:
        """Fill all masked positions along the time grid.

        The reference derives the number of tokens a step from the batch's mean mask count; it is counted per
        row here, which is the same where rows are alike and does not mix requests where they are not.
        """
        ids = state.ids_BL
        for step in range(self.steps):
            masked_B = (ids == predict.mask_id).sum(1)
            self.advance(predict, state, step, self.commits(torch.tensor(step, device=ids.device), masked_B))
            if state.on_step is not None:
                state.on_step(step, ids)

    def commits(self, step_B: Tensor, masked_B: Tensor) -> Tensor:
        """Return how many of its masked tokens each row commits at its step."""
        return (masked_B.float() * self._shares(step_B)).long()

    def idle(self, step: int, masked: int) -> bool:
        """Return whether a step commits nothing and draws nothing: it need not be computed."""
        drawn = self.temperature > 0 or self.alg == "origin" or bool(self.alg_temp)
        return not drawn and step < self.steps and int(self.commits(torch.tensor(step), torch.tensor(masked))) == 0

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
            share_B = self._shares(torch.as_tensor(step, device=ids.device)).expand(len(ids))
            chosen = rowwise_uniform(rows, state.generators) < share_B[rows]
        else:
            if self.alg_temp:  # Gumbel top-k: sampling without replacement from softmax(confidence / alg_temp)
                noise = rowwise_uniform(rows, state.generators).clamp_min(1e-300)
                confidence = confidence / self.alg_temp - (-noise.log()).log()
            chosen = top_ranked(confidence, rows, columns, ids.shape, commit_B)
        ids[rows[chosen], columns[chosen]] = token[chosen]

    def candidates(
        self,
        predict: MaskPredictor,
        state: DenoisingState,
        at: tuple[Tensor, Tensor],
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (token [N], confidence [N]) for masked positions."""
        u_N = rowwise_uniform(at[0], state.generators) if self.temperature else None
        found = [
            sample_dream(
                logits_NV, self.alg, self.temperature, self.top_p, self.top_k, None if u_N is None else u_N[part]
            )
            for part, logits_NV in predict.chunks(state.ids_BL, at, visible_BL=state.visible_BL, cache=cache)
        ]
        return torch.cat([token for token, _ in found]), torch.cat([confidence for _, confidence in found])

    def _shares(self, step_B: Tensor) -> Tensor:
        """Return the share of the masked tokens that each row's step commits: all at the last one."""
        times = torch.linspace(1, self.eps, self.steps + 1)
        share = 1 - times[1:] / times[:-1]
        share[-1] = 1.0
        return share.to(step_B.device)[step_B]


def _positive(sampler: object, *names: str) -> None:
    for name in names:
        if getattr(sampler, name) < 1:
            raise ConfigError(f"{name}: got {getattr(sampler, name)}, allowed: 1 or more")


def _not_negative(sampler: object, *names: str) -> None:
    for name in names:
        if getattr(sampler, name) < 0:
            raise ConfigError(f"{name}: got {getattr(sampler, name)}, allowed: 0 or more")
