"""Generation: append a masked answer to each prompt and let a sampler fill it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from starquant.diffusion.masking import seeded_generator
from starquant.diffusion.predictor import MaskPredictor
from starquant.diffusion.samplers import DenoisingState, OnStep, Sampler
from starquant.diffusion.special_tokens import end_token_ids
from starquant.errors import ConfigError


@torch.inference_mode()
def generate(
    model: nn.Module | MaskPredictor,
    prompt_ids: Tensor,
    sampler: Sampler,
    *,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return ids [B, prompt + answer].

    Args:
        model: of any family; the mask id comes from its config.
        prompt_ids: [B, P]; prompts of unequal length are padded on the left.
        sampler: how to denoise.
        attention_mask: [B, P], zero on padding; None without padding.
        seed: of the random draws (temperature > 0, random remasking); each row's own prompt is mixed in.
        seeds: one a row instead, used as they are.
        on_step: called after every denoising step with (step, ids [B, prompt + answer], rows that took it [B] or None
            for all: in block diffusion rows wait for others); ids change in place.

    Raises:
        ValueError: prompt ids that are not [B, P] integers of the vocabulary, a mask or seeds of another size.
        ConfigError: prompts that do not fit the model's context beside the answer.
    """
    predict = model if isinstance(model, MaskPredictor) else MaskPredictor(model)
    if prompt_ids.dim() != 2 or prompt_ids.is_floating_point():
        raise ValueError(f"prompt_ids must be integers [B, P], got {prompt_ids.dtype} {list(prompt_ids.shape)}")
    _validate_vocabulary(prompt_ids, predict.config)
    if attention_mask is not None and attention_mask.shape != prompt_ids.shape:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} differs from prompt_ids {list(prompt_ids.shape)}"
        )
    if seeds is not None and len(seeds) != len(prompt_ids):
        raise ValueError(f"got {len(seeds)} seeds for {len(prompt_ids)} prompts")
    validate_room(predict.config, prompt_ids.shape[1], sampler.answer_length)
    generators = _generators(prompt_ids, attention_mask, seed, seeds)
    prompt_ids = prompt_ids.to(predict.device)
    answer = prompt_ids.new_full((len(prompt_ids), sampler.answer_length), predict.mask_id)
    ids_BL = torch.cat((prompt_ids, answer), dim=1)
    visible = None
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        prompt_visible = attention_mask.bool().to(predict.device)
        visible = torch.cat((prompt_visible, torch.ones_like(answer, dtype=torch.bool)), dim=1)
    prompt_BL = ids_BL != predict.mask_id  # as LLaDA's official code: what is visible at the start
    state = DenoisingState(ids_BL, prompt_ids.shape[1], visible, generators, on_step, prompt_BL=prompt_BL)
    sampler.denoise(predict, state)
    return ids_BL


def _validate_vocabulary(prompt_ids: Tensor, config: Any) -> None:
    """Refuse ids that have no embedding; raises ValueError."""
    rows = getattr(config, "embedding_size", None) or getattr(config, "vocab_size", None)
    if rows is not None and bool((wrong := (prompt_ids < 0) | (prompt_ids >= rows)).any()):
        first = int(prompt_ids[wrong][0])
        raise ValueError(f"prompt_ids: got {first}, allowed: 0 to {rows - 1}, the model's vocabulary")


def validate_room(config: Any, longest: int, answer_length: int) -> None:
    """Judge the tokens of the longest prompt; raises ConfigError where they leave the answer no room in the context."""
    context_length = getattr(config, "context_length", None)
    if context_length is not None and longest + answer_length > context_length:
        raise ConfigError(
            f"prompt: got {longest} tokens, allowed: at most {max(0, context_length - answer_length)} beside an answer "
            f"of {answer_length} in the model's context of {context_length}"
        )


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids [B, P] and where they are real [B, P] of prompts padded on the left; P is 1 where all are empty."""
    width = max(1, *map(len, prompts))
    ids_BP = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    first_B1 = torch.tensor([[width - len(prompt)] for prompt in prompts])
    return ids_BP, torch.arange(width) >= first_B1


def end_of_text(config: Any, answer: Sequence[int]) -> int:
    """Return the number of tokens in front of the first end-of-text or end-of-turn.

    Raises:
        CheckpointError: the configuration names no end-of-text.
    """
    ends = end_token_ids(config)
    return next((i for i, token in enumerate(answer) if token in ends), len(answer))


def _generators(
    prompt_ids: Tensor, attention_mask: Tensor | None, seed: int, seeds: Sequence[int] | None
) -> list[torch.Generator]:
    if seeds is not None:
        return [torch.Generator().manual_seed(s) for s in seeds]
    rows = prompt_ids.tolist()
    if attention_mask is not None:
        rows = [[t for t, m in zip(r, v, strict=True) if m] for r, v in zip(rows, attention_mask.tolist(), strict=True)]
    return [seeded_generator(seed, "generation", row) for row in rows]
