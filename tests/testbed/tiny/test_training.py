"""Training of the embedded model: repeatable, resumable, and with the loss it claims."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from starquant.errors import CheckpointError
from starquant.models import load_model, load_tokenizer
from starquant.models.llada import LLaDAModelLM
from starquant.testbed.items import Item, Split, rng_for
from starquant.testbed.tiny import arithmetic, objectives, programs, recipes, train, world
from starquant.testbed.tiny.tokenizer import vocabulary

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_domain", cache(programs._domain))  # computed anew for every draw otherwise
        patch.setattr(train, "SAVE_EVERY", 2)
        yield


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "whole"
    train.train(folder, seed=3, steps=STEPS)
    return folder


def test_training_is_repeatable(uninterrupted: Path, tmp_path: Path) -> None:
    torch.manual_seed(999)  # the caller's randomness does not matter
    train.train(tmp_path, seed=3, steps=STEPS)
    assert _weights(tmp_path) == _weights(uninterrupted)


def test_the_seed_matters(uninterrupted: Path, tmp_path: Path) -> None:
    train.train(tmp_path, seed=4, steps=STEPS)
    assert _weights(tmp_path) != _weights(uninterrupted)


class Killed(BaseException):
    """Stands for SIGKILL."""


def _train_killed_at(folder: Path, step: int) -> None:
    """Train until `step` steps are done, then die."""

    def deadly(now: int, steps: int) -> float:
        if now == step:
            raise Killed
        return learning_rate(now, steps)

    learning_rate = train.learning_rate
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "learning_rate", deadly)
        train.train(folder, seed=3, steps=STEPS)


@pytest.mark.parametrize("kills", [(1,), (2,), (3,), (5,), (3, 5), (3, 2, 4)], ids=str)
def test_a_killed_training_goes_on(uninterrupted: Path, tmp_path: Path, kills: tuple[int, ...]) -> None:
    for step in kills:
        _train_killed_at(tmp_path, step)
        assert not (tmp_path / "model.safetensors").exists()
    done, learning_rate = set(), train.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda now, steps: done.add(now) or learning_rate(now, steps))
        train.train(tmp_path, seed=3, steps=STEPS)
    assert _weights(tmp_path) == _weights(uninterrupted)
    assert done == set(range(max(kills) // 2 * 2, STEPS))  # nothing saved is done again


def test_killed_while_saving_the_last_whole_state_counts(uninterrupted: Path, tmp_path: Path) -> None:
    save_file, saved = train.save_file, []

    def torn(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(state, path, metadata=metadata)
        saved.append(metadata["step"])
        if len(saved) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_file", torn)
        train.train(tmp_path, seed=3, steps=STEPS)
    assert saved == ["2", "4"]
    train.train(tmp_path, seed=3, steps=STEPS)
    assert _weights(tmp_path) == _weights(uninterrupted)


def test_the_result_is_a_checkpoint(uninterrupted: Path) -> None:
    model, tokenizer = load_model(uninterrupted), load_tokenizer(uninterrupted)
    assert len(tokenizer) == len(vocabulary()) <= model.config.rows
    assert tokenizer.mask_token_id == model.mask_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    card = json.loads((uninterrupted / "training.json").read_text())
    assert (card["seed"], card["steps"]) == (3, STEPS)
    assert not list(uninterrupted.glob("training_state*"))


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [train.learning_rate(step, 2_000) for step in range(2_001)]
    peak = max(rates)
    assert peak == pytest.approx(train.LEARNING_RATE)
    assert 0 < rates[0] < peak / 50
    assert rates[train.WARMUP - 1 : 600] == pytest.approx([peak] * (601 - train.WARMUP))
    assert rates[1_300] == pytest.approx(peak / 2)
    assert rates[2_000] == 0


ITEMS = [
    Item("what is the city of ada ?", "oslo", "a"),
    Item("f 1 = 5 ; f x =", "x + 4", "b"),
    Item("ada has 7 coins . buys 3 . how many ?", "10 , 8 , 16", "c"),
]


@pytest.mark.parametrize("pad_answer", [False, True])
def test_items_become_padded_rows(pad_answer: bool) -> None:
    words = vocabulary()
    ids, real, answer = objectives.encode(ITEMS, pad_answer)
    for row, item in enumerate(ITEMS):
        prompt, target = item.prompt.split(), item.answer.split()
        if pad_answer:
            target = (target + ["<eos>"] * 8)[:8]
        length = len(prompt) + len(target)
        assert ids[row, :length].tolist() == [words[word] for word in prompt + target]
        assert ids[row, length:].eq(words["<eos>"]).all()
        assert real[row].tolist() == [True] * length + [False] * (ids.shape[1] - length)
        assert answer[row].nonzero().flatten().tolist() == list(range(len(prompt), length))


class Seen:
    """Stands in for the model and keeps what it was asked; answers with it, or with equal logits."""

    mask_token_id = vocabulary()["[MASK]"]
    device = torch.device("cpu")

    def __init__(self, model: Any = None) -> None:
        self.model, self.noisy, self.visible = model, list[Tensor](), list[Tensor]()

    def __call__(self, noisy: Tensor, attention_mask: Tensor, logit_positions: tuple[Tensor, Tensor]) -> Any:
        self.noisy.append(noisy)
        self.visible.append(attention_mask)
        if self.model is not None:
            return self.model(noisy, attention_mask=attention_mask, logit_positions=logit_positions)
        return type("Output", (), {"logits": torch.zeros(len(logit_positions[0]), len(vocabulary()))})


def _batch(kinds: Any, pad_answer: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return objectives.encode(train._draw(kinds, rng_for("loss", seed)), pad_answer)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kinds", "pad_answer"), [(train.SHORT, False), (train.LONG, True)], ids=["short", "long"])
def test_the_loss_is_the_slow_one(kinds: Any, pad_answer: bool, seed: int) -> None:
    model = LLaDAModelLM(recipes.tiny_config())
    batch = _batch(kinds, pad_answer, seed)
    ids, real, _ = batch
    seen = Seen(model)
    with torch.no_grad():
        loss = objectives.masked_loss(seen, batch, torch.Generator().manual_seed(seed)).item()
    [noisy], [visible] = seen.noisy, seen.visible
    assert torch.equal(visible, real)
    total = 0.0
    for row in range(len(ids)):
        length = int(real[row].sum())
        masked = [i for i in range(ids.shape[1]) if noisy[row, i] != ids[row, i]]
        assert masked
        assert max(masked) < length
        assert all(noisy[row, i] == seen.mask_token_id for i in masked)
        with torch.no_grad():
            logits = model(noisy[row : row + 1, :length]).logits[0].double()
        losses = [logits[i].logsumexp(0) - logits[i, ids[row, i]] for i in masked]
        total += float(sum(losses)) / len(losses)
    assert loss == pytest.approx(total, rel=1e-5)


def test_equal_logits_lose_the_logarithm_of_the_vocabulary() -> None:
    batch = _batch(train.LONG, True)
    loss = objectives.masked_loss(Seen(), batch, torch.Generator().manual_seed(1))
    assert loss.item() == pytest.approx(len(batch[0]) * math.log(len(vocabulary())), rel=1e-5)


def _masked(batch: tuple[Tensor, Tensor, Tensor], answer_only: float, rounds: int) -> Tensor:
    """Return which tokens were masked, [rounds * B, L]."""
    seen, generator = Seen(), torch.Generator().manual_seed(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "ANSWER_ONLY", answer_only)
        for _ in range(rounds):
            objectives.masked_loss(seen, batch, generator)
    return torch.cat([noisy == seen.mask_token_id for noisy in seen.noisy])


def test_every_number_and_place_of_answer_tokens_is_masked_alike() -> None:
    batch = _batch(train.LONG, True)
    masked = _masked(batch, 1.0, 150)
    answer = batch[2].repeat(150, 1)
    assert not masked[~answer].any()
    counts = masked.sum(1)
    shares = torch.bincount(counts, minlength=9).double() / len(counts)
    assert shares[0] == 0
    assert shares[1:].tolist() == pytest.approx([1 / 8] * 8, abs=0.02)
    places = masked[answer].view(-1, 8).double().mean(0)
    assert places.tolist() == pytest.approx([4.5 / 8] * 8, abs=0.03)


def test_other_samples_are_masked_anywhere_but_in_padding() -> None:
    batch = _batch(train.LONG, True)
    masked = _masked(batch, 0.0, 40)
    real, answer = batch[1].repeat(40, 1), batch[2].repeat(40, 1)
    assert not masked[~real].any()
    in_prompt, in_answer = (masked[where].double().mean().item() for where in (real & ~answer, answer))
    assert in_prompt == pytest.approx(in_answer, abs=0.03)
    assert masked.any(0)[: int(batch[1].sum(1).min())].all()


def test_nine_samples_in_ten_are_masked_in_the_answer_only() -> None:
    batch = _batch(train.LONG, True)
    masked = _masked(batch, objectives.ANSWER_ONLY, 40)
    touched = (masked & ~batch[2].repeat(40, 1)).any(1).double().mean().item()
    assert 0.06 < touched <= 0.13


def test_training_draws_training_items() -> None:
    asked = []

    def spy(rng: Any, split: Split) -> Item:
        asked.append(split)
        return ITEMS[0]

    assert train._draw(((spy, 3), (spy, 2)), rng_for("x")) == [ITEMS[0]] * 5
    assert asked == [Split.TRAIN] * 5
    drawers = [draw for draw, _ in train.SHORT + train.LONG]
    assert drawers == [world.random_fact, world.random_profile, arithmetic.random_problem, programs.random_task]


def test_another_training_is_not_resumed(tmp_path: Path) -> None:
    """A state of another seed or length would silently become this one's weights."""
    model = LLaDAModelLM(recipes.tiny_config())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    train._save_state(tmp_path / "training_state.safetensors", model, optimizer, {"seed": "3", "steps": "4"}, 2)
    for seed, steps in ((4, 4), (3, 6)):
        with pytest.raises(CheckpointError, match="another training"):
            train.train(tmp_path, seed=seed, steps=steps)
