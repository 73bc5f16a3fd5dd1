"""Block diffusion: the published samplers' generations, token for token, with and without kept keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from starquant.config.speed import SpeedSpec
from starquant.diffusion import (
    BatchSize,
    LLaDA2Sampler,
    LLaDA21Sampler,
    LLaDASampler,
    MaskPredictor,
    SDARSampler,
    generate,
    generate_approximately,
    generate_many,
)
from starquant.diffusion.generation import left_padded
from starquant.diffusion.samplers import BlockSampler
from starquant.errors import ConfigError
from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import CommittedCache
from tests.support.paths import GOLDEN, golden_arrays


@pytest.fixture(scope="module")
def sdar() -> MaskedDiffusionModel:
    return load_model(GOLDEN / "sdar_gqa")


def sdar_sampler(z: dict[str, Any], i: int, cache: bool) -> SDARSampler:
    """Return the sampler of an answer up to the end of its last block, which is what the official code gives back."""
    prompt, answer, block = z[f"gen{i}_prompt_ids"], int(z[f"gen{i}_gen_length"]), int(z[f"gen{i}_block_length"])
    return SDARSampler(
        gen_length=answer - (prompt.shape[1] + answer) % -block,
        block_length=block,
        cache=cache,
        steps_per_block=int(z[f"gen{i}_denoising_steps"]),
        remasking=str(z[f"gen{i}_remasking_strategy"]),
        threshold=float(z[f"gen{i}_confidence_threshold"]),
        stop_ids=tuple(z[f"gen{i}_stop_ids"].tolist()),
    )


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("i", range(4))
def test_sdar(sdar: MaskedDiffusionModel, i: int, cache: bool) -> None:
    z = golden_arrays("sdar_gqa")
    prompt, sampler = torch.tensor(z[f"gen{i}_prompt_ids"]), sdar_sampler(z, i, cache)
    together = generate(sdar, prompt, sampler)
    assert np.array_equal(together.numpy(), z[f"gen{i}_output_ids"])
    for row in range(2):
        states: list[Tensor] = []
        alone = generate(
            sdar, prompt[row : row + 1], sampler, on_step=lambda _, ids, __, s=states: s.append(ids.clone())
        )
        assert torch.equal(alone[0], together[row])
        trace, store = z[f"gen{i}_trace{row}_ids"], z[f"gen{i}_trace{row}_store"]
        first, length = 10 // sampler.block_length * sampler.block_length, sampler.block_length
        want, block = [], 0
        for number, (ids, stored) in enumerate(zip(trace, store, strict=True)):
            if number and not store[number - 1]:  # what the call before it left behind it
                want.append((block, ids))
            block += int(stored)
        for got, (block, ids) in zip(states, want, strict=True):
            begin = first + block * length
            assert np.array_equal(got[0, begin : begin + length].numpy(), ids)


@pytest.fixture(scope="module")
def llada2() -> MaskedDiffusionModel:
    return load_model(GOLDEN / "llada2_moe_a")


def llada2_sampler(z: dict[str, Any], i: int, cache: bool) -> LLaDA2Sampler | LLaDA21Sampler:
    common: dict[str, Any] = {"cache": cache, "eos_id": int(z[f"gen{i}_eos_id"])}
    common |= {key: int(z[f"gen{i}_{key}"]) for key in ("gen_length", "block_length")}
    common |= {"threshold": float(z[f"gen{i}_threshold"]), "eos_early_stop": bool(z[f"gen{i}_eos_early_stop"])}
    if str(z[f"gen{i}_version"]) == "2.0":
        own = {"steps_per_block": int(z[f"gen{i}_steps"]), "minimal_topk": int(z[f"gen{i}_minimal_topk"])}
        return LLaDA2Sampler(**common | own)
    own = {key: int(z[f"gen{i}_{key}"]) for key in ("max_post_steps", "num_to_transfer")}
    return LLaDA21Sampler(**common | own, editing_threshold=float(z[f"gen{i}_editing_threshold"]))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("i", range(7))
def test_llada2(llada2: MaskedDiffusionModel, i: int, cache: bool) -> None:
    z = golden_arrays("llada2_moe_a")
    prompt, sampler = torch.tensor(z[f"gen{i}_prompt_ids"]), llada2_sampler(z, i, cache)
    together = generate(llada2, prompt, sampler) if cache else None
    for row in range(2):
        states: list[Tensor] = [torch.cat((prompt[row], torch.full((sampler.gen_length,), 390)))]
        alone = generate(
            llada2, prompt[row : row + 1], sampler, on_step=lambda _, ids, __, s=states: s.append(ids[0].clone())
        )
        assert together is None or torch.equal(alone[0], together[row])
        answer, want = alone[0, 11:].tolist(), z[f"gen{i}_output{row}_ids"].tolist()
        if sampler.eos_id in answer:
            answer = answer[: answer.index(sampler.eos_id) + 1]
        if (i, row) == (3, 0):  # the reference's early stop returns the prompt as well
            assert want[:11] == prompt[0].tolist()
            want = want[11:]
        assert answer == want
        calls = zip(z[f"gen{i}_trace{row}_ids"], z[f"gen{i}_trace{row}_block"], strict=True)
        for state, (ids, block) in zip(states, calls, strict=False):  # what each call of the model reads
            begin = int(block) * sampler.block_length
            got = state[begin : begin + sampler.block_length].numpy()
            assert np.array_equal(got, ids[: len(got)])
        assert len(states) - 1 == len(z[f"gen{i}_trace{row}_ids"])


def test_editing_ends_though_every_pass_would_edit(llada2: MaskedDiffusionModel) -> None:
    """A predictor that never agrees with itself: the published loop has the same bound only once no mask is left."""

    class Restless(MaskPredictor):
        calls = 0

        def _logits(self, hidden_ND: Tensor) -> Tensor:
            self.calls += 1
            logits_NV = torch.zeros(len(hidden_ND), 400)
            logits_NV[:, self.calls % 7] = 50.0
            logits_NV[:, self.mask_id] = 60.0  # which is no token
            return logits_NV

    restless = Restless(llada2)
    sampler = LLaDA21Sampler(8, 8, threshold=1.0, editing_threshold=0.0, max_post_steps=3)
    out = generate(restless, torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), sampler)
    assert restless.calls == 8 + 3
    assert not bool((out == 390).any())


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(
    "sampler",
    [
        SDARSampler(14, 4, remasking="low_confidence_dynamic", threshold=0.5),
        SDARSampler(14, 4, temperature=0.7, stop_ids=()),
    ],
)
def test_batches_of_any_prompts_give_what_each_gives_alone(sdar: MaskedDiffusionModel, sampler: SDARSampler) -> None:
    """Padded on the left, in groups of one length, or one by one."""
    some = prompts(9, 5, 9, 12)
    alone = [generate(sdar, torch.tensor([prompt]), sampler)[0, len(prompt) :].tolist() for prompt in some]
    ids_BP, visible_BP = left_padded(some, 302)
    padded = generate(sdar, ids_BP, sampler, attention_mask=visible_BP)
    assert padded[:, 12:].tolist() == alone
    many = dict(generate_many(MaskPredictor(sdar), some, sampler, batch_size=BatchSize(2)))
    assert [many[i] for i in range(4)] == [a[: a.index(300)] if 300 in a else a for a in alone]


def test_an_answer_that_is_settled_takes_no_further_block(sdar: MaskedDiffusionModel) -> None:
    some, seen = prompts(8, 8), list[int]()
    sampler = SDARSampler(24, 4, stop_ids=())
    whole = generate(sdar, torch.tensor(some), sampler)[:, 8:].tolist()

    def settled(index: int, known: list[int]) -> bool:
        seen.append(len(known))
        return index == 0 and len(known) >= 8

    many = dict(generate_many(MaskPredictor(sdar), some, sampler, batch_size=BatchSize(2), settled=settled))
    assert many == {0: whole[0][:8], 1: whole[1]}
    assert seen == [4, 4, 8, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("cache", [True, False])
def test_kept_keys_spare_passes_over_what_is_committed(sdar: MaskedDiffusionModel, cache: bool) -> None:
    columns: list[int] = []
    block = sdar.trunk().blocks[0]
    handle = block.register_forward_pre_hook(lambda _, args: columns.append(args[0].shape[1]))
    generate(sdar, torch.tensor(prompts(8)), SDARSampler(32, 4, cache=cache, stop_ids=()))
    handle.remove()
    assert len(columns) == 8 * 4
    assert columns[:8] == ([12, 4, 4, 4, 8, 4, 4, 4] if cache else [12] * 4 + [16] * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_length": 0}, "block_length: got 0, allowed: 1 or more"),
        ({"threshold": 0.0}, r"threshold: got 0\.0, allowed: above 0, at most 1"),
        ({"threshold": 1.5}, r"threshold: got 1\.5, allowed: above 0, at most 1"),
        ({"remasking": "entropy_bounded"}, "remasking: got 'entropy_bounded', allowed: low_confidence_dynamic, "),
        ({"steps_per_block": 0}, "steps_per_block: got 0, allowed: 1 or more"),
        ({"temperature": -1.0}, r"temperature: got -1\.0, allowed: 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SDARSampler(**{"gen_length": 8, "block_length": 4} | settings)


def test_blocks_need_a_model_that_has_them(sdar: MaskedDiffusionModel) -> None:
    prompt = torch.tensor(prompts(8))
    with pytest.raises(ConfigError, match=r"block_length: got 300, allowed: 1 to the model's context of 256"):
        generate(sdar, prompt, SDARSampler(8, 300))
    with pytest.raises(ConfigError, match="LLaDAModelLM has none"):
        generate(load_model(GOLDEN / "llada_mha"), prompt, SDARSampler(8, 4))
    speed = SpeedSpec(kv_cache="dual")
    with pytest.raises(ConfigError, match="speed: got shortcuts of generation"):
        [*generate_approximately(MaskPredictor(sdar), [[1]], SDARSampler(8, 4), speed, batch_size=BatchSize(1))]
    assert generate(sdar, prompt, LLaDASampler(8, 8, 4)).shape == (1, 16)  # any family's sampler runs on any model


def caches_of(model: MaskedDiffusionModel, monkeypatch: pytest.MonkeyPatch) -> list[CommittedCache]:
    """The caches that the model's generations make from now on."""
    made: list[CommittedCache] = []
    own = model.committed_cache
    monkeypatch.setattr(model, "committed_cache", lambda columns=0: (made.append(own(columns)), made[-1])[1])
    return made


@pytest.mark.parametrize(
    ("folder", "sampler"),
    [
        ("sdar_gqa", SDARSampler(24, 8, stop_ids=())),
        ("llada2_moe_a", LLaDA2Sampler(24, 8, steps_per_block=4, threshold=1.0, eos_id=399)),
        ("llada2_moe_a", LLaDA21Sampler(24, 8, threshold=0.5, editing_threshold=0.3, max_post_steps=4)),
    ],
)
def test_no_pass_only_commits_and_the_last_block_is_never_kept(
    folder: str, sampler: BlockSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass a step; a block is kept once its last edit is done, by the pass that reads the next one."""
    model = load_model(GOLDEN / folder)
    made, passes, steps, begins = caches_of(model, monkeypatch), list[Tensor](), list[Tensor](), list[int]()
    handle = model.trunk().embedding.register_forward_pre_hook(lambda _, args: passes.append(args[0].clone()))
    prompt = torch.tensor(prompts(8))

    def step(_: int, ids: Tensor, __: Tensor | None) -> None:
        steps.append(ids.clone())
        begins.append(made[0].keep)

    whole = generate(model, prompt, sampler, on_step=step)
    handle.remove()
    assert len(passes) == len(steps)
    assert sorted(set(begins)) == [8, 16, 24]
    assert made[0].keep == 24 < whole.shape[1]
    for before, begin, ids in zip([0, *begins], begins, passes, strict=False):
        assert ids.shape[1] == begin + 8 - before
        assert torch.equal(ids[0, : begin - before], whole[0, before:begin])  # as the answer has it in the end


def test_an_answer_that_ends_early_keeps_nothing_of_its_last_block(
    sdar: MaskedDiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, widths = caches_of(sdar, monkeypatch), list[int]()
    prompt = torch.tensor(prompts(8))
    stop = int(generate(sdar, prompt, SDARSampler(24, 4, stop_ids=()))[0, 12])
    handle = sdar.trunk().embedding.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    answer = generate(sdar, prompt, SDARSampler(24, 4, stop_ids=(stop,)))[0, 8:]
    handle.remove()
    blocks = int((answer != sdar.mask_token_id).sum()) // 4
    assert 1 <= blocks <= 2
    assert len(widths) == 4 * blocks
    assert made[-1].keep == 4 * (blocks + 1)
