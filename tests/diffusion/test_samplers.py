"""Samplers beyond the golden runs: schedules, options, randomness, padding, refusals."""

from __future__ import annotations

import pytest
import torch

from starquant.diffusion import DreamSampler, LLaDASampler, MaskPredictor, forward_mask, generate
from starquant.diffusion.sampling import rowwise_uniform, sample_dream, sample_tokens
from starquant.errors import ConfigError

LLADA = [
    LLaDASampler(8, 8, 8),
    LLaDASampler(4, 8, 4),
    LLaDASampler(8, 8, 4, cfg_scale=0.5),
    LLaDASampler(8, 8, 8, temperature=0.7),
    LLaDASampler(8, 8, 4, remasking="random"),
    LLaDASampler(8, 8, 8, logits_eos_inf=True),
    LLaDASampler(8, 8, 4, confidence_eos_eot_inf=True),
]
DREAM = [
    DreamSampler(8, 8),
    DreamSampler(3, 8, alg="maskgit_plus", temperature=0.5, top_p=0.9),
    DreamSampler(8, 8, alg="topk_margin", top_k=None),
    DreamSampler(8, 8, alg="origin", temperature=1.0),
    DreamSampler(8, 8, alg="entropy", alg_temp=0.3),
]


def _samplers(family: str) -> list:
    return LLADA if family == "llada_mha" else DREAM


def test_answers_hold_no_mask_and_keep_the_prompt(family: str, golden_model) -> None:
    prompt = torch.randint(0, 499, (3, 5))
    for sampler in _samplers(family):
        out = generate(golden_model, prompt, sampler)
        assert out.shape == (3, 5 + sampler.answer_length)
        assert torch.equal(out[:, :5], prompt)
        assert not bool((out == 500).any()), sampler


def test_a_row_does_not_depend_on_its_batch(family: str, golden_model) -> None:
    """Prompts of unequal length, padded on the left, against one by one; random draws included."""
    lengths = (3, 6, 4)
    prompts = [torch.randint(0, 499, (n,)) for n in lengths]
    ids = torch.full((3, 6), 501)
    visible = torch.zeros(3, 6, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 6 - len(prompt) :], visible[row, 6 - len(prompt) :] = prompt, 1
    for sampler in _samplers(family):
        together = generate(golden_model, ids, sampler, attention_mask=visible, seed=5)
        for row, prompt in enumerate(prompts):
            alone = generate(golden_model, prompt[None], sampler, seed=5)
            assert torch.equal(together[row, 6:], alone[0, len(prompt) :]), sampler


def test_blocks_are_filled_from_left_to_right(golden_model, family: str) -> None:
    if family != "llada_mha":
        pytest.skip("LLaDA's schedule")
    seen: list[torch.Tensor] = []
    generate(
        golden_model, torch.tensor([[1, 2]]), LLaDASampler(6, 8, 4), on_step=lambda _, x, __: seen.append(x.clone())
    )
    left = [[int((s[0, a:b] == 500).sum()) for a, b in ((2, 6), (6, 10))] for s in seen]
    # four tokens in three steps: the remainder goes to the first step
    assert left == [[2, 4], [1, 4], [0, 4], [0, 2], [0, 1], [0, 0]]


def test_eos_switches(golden_model, family: str) -> None:
    if family != "llada_mha":
        pytest.skip("LLaDA's switches")

    def biased(eos_bonus: float) -> MaskPredictor:
        class Biased(MaskPredictor):
            def chunks(self, *args, **kwargs):
                for part, logits in super().chunks(*args, **kwargs):
                    logits[:, 501] += eos_bonus
                    yield part, logits

        return Biased(golden_model)

    prompt = torch.tensor([[1, 2, 3]])
    assert bool((generate(biased(100.0), prompt, LLaDASampler(4, 8, 8))[0, 3:] == 501).all())
    assert not bool((generate(biased(100.0), prompt, LLaDASampler(4, 8, 8, logits_eos_inf=True))[0, 3:] == 501).any())

    class EosAtTheEnd(MaskPredictor):
        """Surely EOS in the last half of the answer, anything before."""

        def chunks(self, ids, positions, **kwargs):
            for part, logits in super().chunks(ids, positions, **kwargs):
                logits[:, 501] = torch.where(positions[1][part] >= 7, 100.0, -100.0)
                yield part, logits

    orders = {}
    for switch in (False, True):
        seen: list[torch.Tensor] = []
        sampler = LLaDASampler(8, 8, 8, confidence_eos_eot_inf=switch)
        generate(
            EosAtTheEnd(golden_model), prompt, sampler, on_step=lambda _, x, __, s=seen: s.append(x[0, 3:].clone())
        )
        orders[switch] = [int((x[4:] == 501).sum()) for x in seen]
    assert orders[False][:4] == [1, 2, 3, 4]  # EOS is surest and goes first
    assert orders[True] == [0, 0, 0, 0, 1, 2, 3, 4]  # told not to trust it, it goes last


def test_random_remasking_differs_with_the_seed_only(golden_model, family: str) -> None:
    if family != "llada_mha":
        pytest.skip("LLaDA's remasking")
    prompt = torch.randint(0, 499, (1, 4))
    sampler = LLaDASampler(16, 16, 16, remasking="random")
    first, again, other = (generate(golden_model, prompt, sampler, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("draw", ["llada", "dream"])
def test_sampling_frequencies_follow_the_softmax(draw: str) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    n, temperature = 20_000, 0.8
    many, rows = logits.expand(n, 3), torch.zeros(n, dtype=torch.long)
    draws = rowwise_uniform(rows, [torch.Generator().manual_seed(0)])
    if draw == "llada":
        tokens = sample_tokens(many, temperature, draws)
    else:
        tokens, _ = sample_dream(many, "entropy", temperature, None, None, draws)
    frequency = torch.bincount(tokens, minlength=3) / n
    assert torch.allclose(frequency, (logits / temperature).softmax(0), atol=0.015)


def test_nucleus_and_top_k_limit_the_candidates() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, 4)
    draws = rowwise_uniform(torch.zeros(2000, dtype=torch.long), [torch.Generator().manual_seed(0)])
    nucleus, _ = sample_dream(logits, "maskgit_plus", 1.0, 0.7, None, draws)
    assert set(nucleus.tolist()) == {0, 1}  # 0.5 does not reach 0.7, 0.5 + 0.3 does
    top, _ = sample_dream(logits, "maskgit_plus", 1.0, None, 3, draws)
    assert set(top.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LLaDASampler(8, 10, 4), "block_length: got 4, must divide gen_length = 10"),
        (lambda: LLaDASampler(3, 8, 4), "steps: got 3, must be a multiple of the 2 blocks"),
        (lambda: LLaDASampler(0, 8, 4), "steps: got 0"),
        (lambda: LLaDASampler(8, 8, 8, remasking="lowconfidence"), "Did you mean 'low_confidence'"),
        (lambda: LLaDASampler(8, 8, 8, cfg_scale=-1), "cfg_scale: got -1"),
        (lambda: DreamSampler(8, 8, alg="entropie"), "Did you mean 'entropy'"),
        (lambda: DreamSampler(8, 8, eps=0.0), "eps: got 0.0"),
        (lambda: DreamSampler(8, 8, top_p=1.5), "top_p: got 1.5"),
        (lambda: DreamSampler(8, 0), "max_new_tokens: got 0"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        make()


def test_bad_prompts_are_refused(golden_model, family: str) -> None:
    sampler = _samplers(family)[0]
    with pytest.raises(ValueError, match="prompt_ids must be integers"):
        generate(golden_model, torch.tensor([1, 2, 3]), sampler)
    with pytest.raises(ValueError, match="attention_mask"):
        generate(golden_model, torch.tensor([[1, 2, 3]]), sampler, attention_mask=torch.ones(1, 2))


def test_forward_mask_ratio_and_bounds() -> None:
    ids = torch.zeros(100, 100, dtype=torch.long)
    noisy = forward_mask(ids, 0.3, 7, torch.Generator().manual_seed(0))
    assert float((noisy == 7).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(forward_mask(ids, 0.0, 7, torch.Generator()), ids)
    assert bool((forward_mask(ids, 1.0, 7, torch.Generator()) == 7).all())
    with pytest.raises(ValueError, match="mask_ratio"):
        forward_mask(ids, 1.1, 7, torch.Generator())


@pytest.mark.parametrize("alg", ["entropy", "maskgit_plus", "topk_margin"])
@pytest.mark.parametrize("ties", [False, True])
def test_greedy_candidates_are_those_of_the_whole_vocabulary(alg: str, ties: bool) -> None:
    """The k likeliest tokens alone, against softmax over all with the others at minus infinity; ties as `argmax`."""
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(3)) * 3
    if ties:
        logits = logits.round()  # many equal to the k-th, more than are looked at in some rows
    token, confidence = sample_dream(logits, alg, 0.0, None, 50)
    kept = logits.masked_fill(logits < logits.sort(1, descending=True).values[:, 49:50], -torch.inf)
    assert torch.equal(token, logits.argmax(1))
    probs = kept.double().softmax(1)
    expected = {
        "entropy": (probs * torch.log(probs + 1e-10)).sum(1),
        "maskgit_plus": probs.amax(1),
        "topk_margin": probs.sort(1, descending=True).values[:, 0] - probs.sort(1, descending=True).values[:, 1],
    }[alg]
    torch.testing.assert_close(confidence.double(), expected, rtol=1e-5, atol=1e-5)
