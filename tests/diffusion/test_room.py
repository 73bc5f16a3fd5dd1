"""Prompts beside the context: cut behind their beginning-of-text, refused by what generates where they do not fit."""

from __future__ import annotations

import pytest
import torch

from starquant.config.speed import SpeedSpec
from starquant.diffusion import BatchSize, MaskPredictor
from starquant.diffusion.cached_generation import generate_approximately
from starquant.diffusion.continuous_batching import generate_many
from starquant.diffusion.generation import generate
from starquant.diffusion.samplers import LLaDASampler
from starquant.diffusion.special_tokens import cut_left
from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel

SAMPLER = LLaDASampler(steps=2, gen_length=8, block_length=8)


@pytest.mark.parametrize(
    ("room", "bos", "kept"),
    [
        (9, 1, [1, 2, 3, 4]),
        (4, 1, [1, 2, 3, 4]),
        (3, 1, [1, 3, 4]),
        (3, None, [2, 3, 4]),
        (3, 2, [2, 3, 4]),
        (1, 1, [1]),
        (1, None, [4]),
        (0, 1, []),
        (0, None, []),
    ],
)
def test_a_beginning_of_text_stays_in_front_of_what_is_cut(room: int, bos: int | None, kept: list[int]) -> None:
    assert cut_left([1, 2, 3, 4], room, bos) == kept


def test_what_does_not_fit_the_context_is_refused(tiny: MaskedDiffusionModel) -> None:
    """By the last token; 248 and an answer of 8 are the context."""
    assert tiny.config.context_length == 256
    message = r"^prompt: got 249 tokens, allowed: at most 248 beside an answer of 8 in the model's context of 256$"
    batch, predict = BatchSize.of(1, tiny), MaskPredictor(tiny)
    assert generate(tiny, torch.full((1, 248), 5), SAMPLER).shape == (1, 256)
    with pytest.raises(ConfigError, match=message):
        generate(tiny, torch.full((1, 249), 5), SAMPLER)
    prompts = [[5], [5] * 249]
    with pytest.raises(ConfigError, match=message):
        next(generate_many(predict, prompts, SAMPLER, batch_size=batch))
    with pytest.raises(ConfigError, match=message):
        next(generate_approximately(predict, prompts, SAMPLER, SpeedSpec(kv_cache="dual"), batch_size=batch))


@pytest.mark.parametrize("beyond", [-1, 0])
def test_ids_beyond_the_vocabulary_are_refused(tiny: MaskedDiffusionModel, beyond: int) -> None:
    rows = tiny.config.embedding_size or tiny.config.vocab_size
    wrong = rows if beyond == 0 else beyond
    with pytest.raises(ValueError, match=rf"^prompt_ids: got {wrong}, allowed: 0 to {rows - 1}, the model's vocab"):
        generate(tiny, torch.tensor([[5, wrong, 5]]), SAMPLER)
    generate(tiny, torch.tensor([[5, rows - 1, 5]]), SAMPLER)
