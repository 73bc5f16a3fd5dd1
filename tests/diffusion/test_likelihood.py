"""Likelihood: the official estimate, exact enumeration, unbiased draws, and independence of the batch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from starquant.diffusion import (
    BatchSize,
    DreamNoise,
    LikelihoodEstimator,
    LLaDANoise,
    MaskPatterns,
    MaskPredictor,
    ScoreRequest,
    predictor,
)
from starquant.diffusion.noise import mask_patterns
from starquant.models import load_model
from tests.support.paths import GOLDEN, golden_arrays

NOISES = {"llada_mha": LLaDANoise(), "dream_gqa": DreamNoise()}


def _log_prob(model, prompt, target, suffix, masked, cfg=0.0) -> float:
    """Sum of log-probabilities at masked target tokens, straight from the full logits."""

    def logits(first):
        noisy = [500 if m else t for t, m in zip(target, masked, strict=True)]
        with torch.no_grad():
            out = model(torch.tensor([[*first, *noisy, *suffix]])).logits[0].double()
        return torch.cat((out[:1], out[:-1])) if model.logit_offset == -1 else out

    values = logits(prompt)
    if cfg:
        empty = logits([500] * len(prompt))
        values = empty + (1 + cfg) * (values - empty)
    log_p = values.log_softmax(-1)
    return sum(float(log_p[len(prompt) + i, t]) for i, (t, m) in enumerate(zip(target, masked, strict=True)) if m)


@pytest.mark.parametrize(("cfg", "name"), [(0.0, "ll_value"), (0.5, "ll_value_cfg0p5")])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_official_estimate_on_the_official_masks(cfg: float, name: str, batch_size: int) -> None:
    z = golden_arrays("llada_mha")
    start, length = len(z["ll_prompt_ids"]), z["ll_noisy"].shape[-1]
    masked = torch.tensor(z["ll_noisy"].reshape(-1, length)[:, start:] == 500)
    weight = 1.0 / torch.tensor(z["ll_p_mask"].reshape(-1, length)[:, -1]).double() / len(masked)

    @dataclass(frozen=True)
    class OfficialMasks(LLaDANoise):
        def draw(self, length, mc_num, generator):
            return MaskPatterns(masked, weight)

    estimator = LikelihoodEstimator(OfficialMasks(), 16, cfg, BatchSize(batch_size))
    request = ScoreRequest(tuple(z["ll_prompt_ids"].tolist()), tuple(z["ll_answer_ids"].tolist()))
    predict = MaskPredictor(load_model(GOLDEN / "llada_mha"))
    assert estimator.score(predict, [request])[0] == pytest.approx(float(z[name]), abs=1e-3)


@pytest.mark.parametrize("cfg", [0.0, 0.7])
def test_enumeration_is_the_expectation(family: str, golden_model, cfg: float) -> None:
    """Against the definition: integrate over l (LLaDA) or t (Dream) and all subsets, one forward each."""
    prompt, target = [7, 8, 9], [11, 12, 13]
    suffix = [501] if family == "dream_gqa" else []
    expected = 0.0
    for masked in itertools.product([False, True], repeat=3):
        k = sum(masked)
        if k == 0:
            continue
        if family == "llada_mha":
            weight = (1 / 3) * (1 / math.comb(3, k)) * (3 / k)
        else:  # midpoint rule over t, p = (1 - eps) t + eps
            t = (np.arange(200_000) + 0.5) / 200_000
            p = 0.999 * t + 0.001
            weight = float(np.mean(p**k * (1 - p) ** (3 - k) / p))
        expected += weight * _log_prob(golden_model, prompt, target, suffix, masked, cfg)
    estimator = LikelihoodEstimator(NOISES[family], 7, cfg)
    request = ScoreRequest(tuple(prompt), tuple(target), tuple(suffix))
    assert estimator.score(MaskPredictor(golden_model), [request])[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("noise", [LLaDANoise(), DreamNoise()])
def test_draws_are_unbiased(noise) -> None:
    """The mean weight of each pattern over many seeds equals its exact weight."""
    exact = mask_patterns(noise, 3, 7, torch.Generator())
    weights = {tuple(m): w for m, w in zip(exact.masked_RT.tolist(), exact.weight_R.tolist(), strict=True)}
    totals = dict.fromkeys(weights, 0.0)
    repeats = 4000
    for seed in range(repeats):
        drawn = noise.draw(3, 6, torch.Generator().manual_seed(seed))
        for masked, weight in zip(drawn.masked_RT.tolist(), drawn.weight_R.tolist(), strict=True):
            if any(masked):
                totals[tuple(masked)] += weight / repeats
    for masked, weight in weights.items():
        assert totals[masked] == pytest.approx(weight, rel=0.08), masked


def test_llada_draws_are_stratified() -> None:
    counts = LLaDANoise().draw(16, 16, torch.Generator().manual_seed(3)).masked_RT.sum(1)
    assert sorted(counts.tolist()) == list(range(1, 17))


def _requests(family: str) -> list[ScoreRequest]:
    rng = np.random.default_rng(0)
    suffix = (501,) if family == "dream_gqa" else ()
    lengths = [(3, 1), (9, 12), (1, 6), (9, 1), (14, 9), (5, 2), (0, 3), (4, 0)]
    draw = [(rng.integers(0, 499, p).tolist(), rng.integers(0, 499, t).tolist()) for p, t in lengths]
    return [ScoreRequest(tuple(p), tuple(t), suffix) for p, t in draw]


@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_score_depends_on_neither_batch_nor_order(family: str, golden_model, cfg: float) -> None:
    predict, requests = MaskPredictor(golden_model), _requests(family)
    one = LikelihoodEstimator(NOISES[family], 8, cfg, batch_size=BatchSize(1)).score(predict, requests)
    many = LikelihoodEstimator(NOISES[family], 8, cfg, batch_size=BatchSize(32)).score(predict, requests[::-1])[::-1]
    assert many == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert one[-1] == 0.0  # an empty target is certain


def test_seed_changes_sampled_scores_only(golden_model, family: str) -> None:
    predict, requests = MaskPredictor(golden_model), _requests(family)
    first, second = (LikelihoodEstimator(NOISES[family], 8, seed=s).score(predict, requests) for s in (0, 1))
    sampled = [2 ** len(r.target) - 1 > 8 for r in requests]
    for a, b, is_sampled in zip(first, second, sampled, strict=True):
        assert (a != pytest.approx(b, rel=1e-6)) == is_sampled


def test_one_token_targets_of_one_prompt_share_one_row(golden_model) -> None:
    calls = []
    predict = MaskPredictor(golden_model)
    inner = golden_model.forward
    golden_model.forward = lambda *a, **k: calls.append(k["input_ids"].shape[0]) or inner(*a, **k)
    suffix = (501,) if golden_model.logit_offset else ()
    requests = [ScoreRequest((1, 2, 3), (t,), suffix) for t in range(10, 26)]
    noise = NOISES["dream_gqa" if golden_model.logit_offset else "llada_mha"]
    LikelihoodEstimator(noise, 128).score(predict, requests)
    assert sum(calls) == 1


def test_large_vocabularies_are_split(golden_model, family: str, monkeypatch) -> None:
    whole = LikelihoodEstimator(NOISES[family], 8).score(MaskPredictor(golden_model), _requests(family))
    monkeypatch.setattr(predictor, "_ELEMENTS", {"cpu": 512 * 4})
    split = LikelihoodEstimator(NOISES[family], 8).score(MaskPredictor(golden_model), _requests(family))
    assert split == pytest.approx(whole, rel=1e-5, abs=1e-5)
