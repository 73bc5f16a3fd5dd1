"""Embedded models of other families: their losses are those that they claim, training is repeatable and resumable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from starquant.models import load_model
from starquant.models.context import Context
from starquant.models.experts import Mixture
from starquant.models.families import family_of
from starquant.models.layers import RMSNorm
from starquant.models.roles import Role
from starquant.testbed.items import ANSWER_LENGTH, rng_for
from starquant.testbed.tiny import objectives, programs, recipes, train, warm_start
from starquant.testbed.tiny.shipped import weights_folder

STEPS, FAMILIES = 4, ("sdar", "llada_moe")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_domain", cache(programs._domain))
        patch.setattr(train, "SAVE_EVERY", 2)
        patch.setattr(train, "START_BATCHES", 1)
        patch.setattr(warm_start, "ATTENTION_FIT", (2, 1e-3))
        patch.setattr(warm_start, "MIXTURE_FIT", (2, 3e-3))
        yield


def _long(seed: int = 0, few: int = 7) -> objectives.Batch:
    items = train._draw(train.LONG, rng_for("families", seed), few)
    return objectives.encode(items, True, 4)


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_training_goes_on_to_the_same_bits(family: str, tmp_path: Path) -> None:
    learning_rate = train.learning_rate

    def deadly(now: int, steps: int) -> float:
        if now == 3:
            raise Killed
        return learning_rate(now, steps)

    train.train(tmp_path / "whole", seed=3, steps=STEPS, family=family)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "learning_rate", deadly)
        train.train(tmp_path / "killed", seed=3, steps=STEPS, family=family)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    torch.manual_seed(999)  # the caller's randomness does not matter
    train.train(tmp_path / "killed", seed=3, steps=STEPS, family=family)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert family_of(load_model(tmp_path / "whole")).name == family


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_the_size_that_is_said(family: str) -> None:
    numbers = sum(parameter.numel() for parameter in recipes.RECIPES[family].new(4).parameters())
    assert 700_000 <= numbers <= 1_000_000


def test_answers_are_padded_to_the_end_of_their_last_block() -> None:
    _, real, answer = _long()
    lengths, answers = real.sum(1), answer.sum(1)
    assert lengths.remainder(4).eq(0).all()
    assert answers.ge(ANSWER_LENGTH).all()
    assert answers.lt(ANSWER_LENGTH + 4).all()


class Recorder:
    """Passes on to a model and keeps what it is asked."""

    def __init__(self, model: Any) -> None:
        self.model, self.asked = model, list[dict[str, Any]]()
        self.device, self.mask_token_id, self.block_length = model.device, model.mask_token_id, model.block_length

    def __call__(self, ids: Tensor, **settings: Any) -> Any:
        self.asked.append({"ids": ids, **settings})
        return self.model(ids, **settings)


@pytest.mark.parametrize("seed", range(2))
def test_the_loss_of_blocks_is_that_of_a_clean_prefix_and_one_noisy_block_at_a_time(seed: int) -> None:
    torch.manual_seed(seed)
    model, batch = recipes.RECIPES["sdar"].new(4), _long(seed)
    ids, real, answer = batch
    recorder = Recorder(model)
    with torch.no_grad():
        loss = objectives.block_loss(recorder, batch, torch.Generator().manual_seed(seed)).item()
    [asked] = recorder.asked
    total = 0.0
    for row in range(len(ids)):
        length, start = int(real[row].sum()), int(answer[row].nonzero()[0])
        noisy = dict(zip(asked["position_ids"][row].tolist(), asked["ids"][row].tolist(), strict=True))  # clean wins
        width = asked["ids"].shape[1] - ids.shape[1]
        noisy |= dict(zip(asked["position_ids"][row, :width].tolist(), asked["ids"][row, :width].tolist(), strict=True))
        for begin in range(start // 4 * 4, length, 4):
            block = [noisy[i] for i in range(begin, begin + 4)]
            targets = [i for i in range(begin, begin + 4) if i >= start]
            masked = [i for i in targets if block[i - begin] == model.mask_token_id]
            assert masked
            assert block[: max(0, start - begin)] == ids[row, begin : max(start, begin)].tolist()
            with torch.no_grad():
                seen = torch.tensor([[*ids[row, :begin].tolist(), *block]])
                logits = model(seen).logits[0].double()
            lost = [float(logits[i].logsumexp(0) - logits[i, ids[row, i]]) for i in masked]
            total += len(targets) / len(masked) * sum(lost) / int(answer[row].sum())
    assert loss == pytest.approx(total, rel=1e-4)


def test_masks_of_blocks_have_the_expectation_of_the_published_noise() -> None:
    """Of every pattern: its chance times n / l against the integral of p^(l-1) (1-p)^(n-l) over p."""
    target = torch.tensor([[False, True, True, True]]).repeat(60_000, 1)
    masked, weight = objectives._masked_in_blocks(target, 4, torch.Generator().manual_seed(0))
    assert not masked[:, 0].any()
    for pattern in itertools.product([False, True], repeat=3):
        equal = (masked[:, 1:] == torch.tensor(pattern)).all(1)
        if not (count := sum(pattern)):
            assert not equal.any()
            continue
        expected = math.gamma(count) * math.gamma(4 - count) / math.gamma(4)
        assert float((equal * weight[:, 1]).mean()) == pytest.approx(expected, rel=0.05)


def test_the_balance_is_one_for_even_experts_and_their_number_for_one() -> None:
    [block, *_] = recipes.RECIPES["llada_moe"].new(1).trunk().blocks
    mixture = block.mlp
    assert isinstance(mixture, Mixture)
    x = torch.ones(1, 64, 128)
    context = Context((x, x), None, torch.zeros(1, 64, dtype=torch.bool))
    for one, expected in ((0.0, 1.0), (1.0, 2.0)):  # four of eight are chosen: twice an even share
        with torch.no_grad(), objectives.load_balance(mixture) as balances:
            mixture.gate.weight.zero_()
            mixture.gate.weight[:4] = one
            mixture(x, context, torch.nn.Identity())
        assert balances[0].item() == pytest.approx(expected, rel=1e-3)
    assert not mixture.gate._forward_hooks


def test_a_warm_start_copies_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "ATTENTION_FIT", (0, 1e-3))
    torch.manual_seed(0)
    model, dense = recipes.RECIPES["sdar"].new(4), load_model(weights_folder(2))
    warm_start.warm_start(model, 2, train._noisy_samples(0))
    new, old = (m.block_sites(m.trunk().blocks[1]).linears for m in (model, dense))
    for role in (Role.K, Role.V, Role.GATE, Role.UP, Role.DOWN):
        assert torch.equal(new[role].weight, old[role].weight)
    shared = new[Role.OUT].weight.unflatten(1, (2, 2, 64)).sum(2).flatten(1)
    assert torch.allclose(shared, old[Role.OUT].weight, atol=1e-6)
    apart = new[Role.Q].weight.unflatten(0, (2, 2, 64)) - old[Role.Q].weight.unflatten(0, (2, 64))[:, None]
    assert apart.std().item() == pytest.approx(warm_start.APART * old[Role.Q].weight.std().item(), rel=0.05)


def test_without_norms_of_queries_and_keys_a_copy_is_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from everywhere, of heads that are not set apart: what is copied is exact."""
    monkeypatch.setattr(warm_start, "ATTENTION_FIT", (0, 1e-3))
    monkeypatch.setattr(warm_start, "APART", 0.0)
    model, dense = recipes.RECIPES["sdar"].new(4), load_model(weights_folder(2))
    warm_start.warm_start(model, 2, train._noisy_samples(0))
    for block in model.trunk().blocks:
        block.self_attn.q_norm = block.self_attn.k_norm = _Unnormed()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = dense.config.rms_norm_eps
    ids, real, _ = _long()
    with torch.no_grad(), model.blocks_of(256):
        logits, expected = (m(ids, attention_mask=real).logits[real] for m in (model, dense))
    assert torch.allclose(logits, expected[:, : logits.shape[1]], atol=1e-3)


class _Unnormed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_layers_are_fitted_to_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for steps in (0, 40):
        monkeypatch.setattr(warm_start, "ATTENTION_FIT", (steps, 1e-3))
        monkeypatch.setattr(warm_start, "MIXTURE_FIT", (steps, 3e-3))
        torch.manual_seed(0)
        model, dense = recipes.RECIPES["llada_moe"].new(4), load_model(weights_folder(2))
        warm_start.warm_start(model, 2, train._noisy_samples(0))
        ids, real = train._noisy_samples(1)[1]
        block = model.trunk().blocks[0]
        layers = warm_start._layers(dense, dense.block_sites(dense.trunk().blocks[0]), ids, real)
        with torch.no_grad():
            context = model.context(ids, real)
            for module, (x, y) in ((block.self_attn, layers.attention), (block.mlp, layers.feed_forward)):
                errors.append(
                    float((module(x, context, torch.nn.Identity()) - x - y)[real].pow(2).mean() / y[real].pow(2).mean())
                )
    attention, feed_forward, fitted_attention, fitted_feed_forward = errors
    assert fitted_attention < 0.7 * attention
    assert fitted_feed_forward < 0.7 * feed_forward
