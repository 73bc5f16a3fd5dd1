"""Continuous generation gives the tokens of the plain loop, request by request, and computes fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from starquant.diffusion import BatchSize, DreamSampler, LLaDASampler, MaskPredictor, generate, generate_many
from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from tests.support.paths import GOLDEN

SAMPLERS: dict[str, tuple[str, Any]] = {
    "llada blocks": ("llada_mha", LLaDASampler(steps=12, gen_length=12, block_length=4)),
    "llada several a step": ("llada_mha", LLaDASampler(steps=6, gen_length=12, block_length=12)),
    "llada more steps than tokens": ("llada_mha", LLaDASampler(steps=24, gen_length=12, block_length=4)),
    "llada guided": ("llada_mha", LLaDASampler(steps=12, gen_length=12, block_length=6, cfg_scale=0.7)),
    "llada sampled": ("llada_mha", LLaDASampler(steps=12, gen_length=12, block_length=6, temperature=0.8)),
    "llada random": ("llada_mha", LLaDASampler(steps=12, gen_length=12, block_length=6, remasking="random")),
    "dream": ("dream_gqa", DreamSampler(steps=12, max_new_tokens=12)),
    "dream few steps": ("dream_gqa", DreamSampler(steps=5, max_new_tokens=12, alg="maskgit_plus")),
    "dream many steps": ("dream_gqa", DreamSampler(steps=40, max_new_tokens=12, alg="topk_margin")),
    "dream sampled": ("dream_gqa", DreamSampler(steps=12, max_new_tokens=12, temperature=0.5, top_p=0.9, alg_temp=0.3)),
    "dream origin": ("dream_gqa", DreamSampler(steps=12, max_new_tokens=12, alg="origin", temperature=0.5)),
}


class Counting(MaskPredictor):
    """Counts forward passes and rows."""

    passes = rows = 0

    def chunks(self, ids_BL: torch.Tensor, *rest: Any, **more: Any) -> Any:
        self.passes, self.rows = self.passes + 1, self.rows + len(ids_BL)
        return super().chunks(ids_BL, *rest, **more)


@pytest.fixture(params=SAMPLERS, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[MaskedDiffusionModel, Any, list[list[int]], list[list[int]]]:
    """Model, sampler, prompts, and the answers of the plain loop."""
    architecture, sampler = SAMPLERS[request.param]
    model = load_model(GOLDEN / architecture)
    generator = torch.Generator().manual_seed(3)
    lengths = (3, 9, 5, 1, 7, 5)
    prompts = [torch.randint(5, model.mask_token_id - 5, (n,), generator=generator).tolist() for n in lengths]
    return model, sampler, prompts, plain(model, sampler, prompts)


def plain(model: MaskedDiffusionModel, sampler: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """One request at a time, every step."""
    return [generate(model, torch.tensor([p]), sampler, seed=4)[0, len(p) :].tolist() for p in prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_tokens_are_those_of_the_plain_loop(case: Any, batch_size: int) -> None:
    model, sampler, prompts, whole = case
    found = dict(generate_many(MaskPredictor(model), prompts, sampler, batch_size=BatchSize(batch_size), seed=4))
    assert [found[i] for i in range(len(prompts))] == whole


@pytest.mark.parametrize("batch_size", [1, 3])
def test_settled_answers_leave_early_and_change_nothing(case: Any, batch_size: int) -> None:
    """The end is a token that the plain answer has; what stands in front of it and the token itself are the same."""
    model, sampler, prompts, whole = case
    ends = [answer[min(i + 1, len(answer) - 1)] for i, answer in enumerate(whole)]
    predict = Counting(model)

    def settled(index: int, known: list[int]) -> bool:
        return ends[index] in known

    for index, answer in generate_many(
        predict, prompts, sampler, batch_size=BatchSize(batch_size), seed=4, settled=settled
    ):
        cut = whole[index].index(ends[index]) + 1
        assert answer[:cut] == whole[index][:cut]
        assert answer == whole[index][: len(answer)]
    everything = Counting(model)
    list(generate_many(everything, prompts, sampler, batch_size=BatchSize(batch_size), seed=4))
    assert predict.rows <= everything.rows


def test_early_ends_save_passes_and_the_batch_is_refilled() -> None:
    """Six requests, two at a time, each settled by its first block: two thirds of the rows are never computed."""
    model, sampler = load_model(GOLDEN / "llada_mha"), LLaDASampler(steps=12, gen_length=12, block_length=4)
    prompts = [[5 + i, 6, 7] for i in range(6)]
    predict = Counting(model)
    found = dict(
        generate_many(predict, prompts, sampler, batch_size=BatchSize(2), settled=lambda _, known: len(known) >= 4)
    )
    assert {len(answer) for answer in found.values()} == {4}
    assert (predict.passes, predict.rows) == (3 * 4, 6 * 4)


def test_steps_that_commit_nothing_are_computed_only_where_they_draw() -> None:
    """Dream commits the whole part of masked x share: with 40 steps for 12 tokens most steps commit nothing."""
    model = load_model(GOLDEN / "dream_gqa")
    greedy, sampled = Counting(model), Counting(model)
    list(generate_many(greedy, [[5, 6, 7]], DreamSampler(steps=40, max_new_tokens=12), batch_size=BatchSize(1)))
    list(
        generate_many(
            sampled, [[5, 6, 7]], DreamSampler(steps=40, max_new_tokens=12, temperature=0.5), batch_size=BatchSize(1)
        )
    )
    assert greedy.passes <= 12
    assert sampled.passes == 40
