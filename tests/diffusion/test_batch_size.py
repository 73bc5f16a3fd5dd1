"""Batches that fit, and what happens when they do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from starquant.diffusion import (
    BatchSize,
    DreamSampler,
    LikelihoodEstimator,
    LLaDASampler,
    MaskPredictor,
    ScoreRequest,
    batch_size,
    generate_many,
)
from starquant.diffusion.batch_size import bytes_per_token, in_batches, out_of_memory
from starquant.diffusion.noise import DreamNoise, LLaDANoise
from starquant.diffusion.prefetch import ahead
from starquant.errors import ConfigError, DeviceError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.families import known_families
from starquant.models.family import Family
from starquant.models.loading import load_model
from tests.support.paths import GOLDEN

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Small(MaskPredictor):
    """A device that holds `room` tokens; fails before the pass, or after it, when draws have been taken."""

    def __init__(self, model: MaskedDiffusionModel, room: int, late: bool) -> None:
        super().__init__(model)
        self.room, self.late, self.failures, self.rows = room, late, 0, list[int]()

    def chunks(self, ids_BL: torch.Tensor, *rest: Any, **more: Any) -> Iterator[tuple[slice, torch.Tensor]]:
        full = ids_BL.numel() > self.room
        self.failures += full
        if full and not self.late:
            raise FULL
        yield from super().chunks(ids_BL, *rest, **more)
        self.rows.append(len(ids_BL))
        if full:
            raise FULL


def requests_of(model: MaskedDiffusionModel) -> list[ScoreRequest]:
    suffix = (501,) if model.logit_offset else ()
    return [ScoreRequest(tuple(range(3, 6 + n)), tuple(range(40, 49)), suffix) for n in range(5)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("architecture", ["llada_mha", "dream_gqa"])
def test_likelihoods_after_out_of_memory_are_the_same(architecture: str, late: bool) -> None:
    model = load_model(GOLDEN / architecture)
    noise, asked = DreamNoise() if model.logit_offset else LLaDANoise(), requests_of(model)
    size, small = BatchSize(16), Small(model, 72, late)
    found = LikelihoodEstimator(noise, 12, batch_size=size).score(small, asked)
    whole = LikelihoodEstimator(noise, 12, batch_size=BatchSize(16)).score(MaskPredictor(model), asked)
    assert found == pytest.approx(whole, rel=1e-5, abs=1e-5)
    assert small.failures == 2 and size.rows(1) == 4  # 16, 8, 4; it stays so


SAMPLERS: dict[str, Any] = {
    "llada_mha": LLaDASampler(12, 12, 6, temperature=0.7, remasking="random"),
    "dream_gqa": DreamSampler(12, 12, temperature=0.7, alg_temp=0.5),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("architecture", SAMPLERS)
def test_tokens_after_out_of_memory_are_the_same(architecture: str, late: bool) -> None:
    model, sampler = load_model(GOLDEN / architecture), SAMPLERS[architecture]
    prompts = [list(range(3, 4 + n)) for n in (7, 2, 5, 1, 3, 6)]
    small, size = Small(model, 70, late), BatchSize(6)
    found = dict(generate_many(small, prompts, sampler, batch_size=size, seed=1))
    whole = dict(generate_many(MaskPredictor(model), prompts, sampler, batch_size=BatchSize(6), seed=1))
    assert found == whole
    assert small.failures == 1 and size.rows(1) == 3


def test_one_sequence_that_does_not_fit_is_the_users_to_know() -> None:
    model = load_model(GOLDEN / "llada_mha")
    with pytest.raises(DeviceError, match=r"^out of memory at one sequence of 1[0-9] tokens: take a larger device$"):
        LikelihoodEstimator(LLaDANoise(), 12).score(Small(model, 9, False), requests_of(model))
    with pytest.raises(DeviceError, match=r"^out of memory at one sequence of 13 tokens"):
        list(generate_many(Small(model, 9, False), [[3]], LLaDASampler(12, 12, 6), batch_size=BatchSize(2)))


def test_other_errors_pass() -> None:
    def work(batch: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(in_batches([1], lambda _: 1, BatchSize(), work))
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert out_of_memory(FULL) and out_of_memory(MemoryError()) and not out_of_memory(ValueError("not enough memory"))


def test_automatic_sizes_follow_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(GOLDEN / "llada_mha")
    a_token = bytes_per_token(model.config)
    for free_tokens, expected in ((10**9, 4096), (2 * 1000, 512), (2 * 64, 64), (0, 1)):
        monkeypatch.setattr(batch_size, "free_bytes", lambda _, free=free_tokens: free * a_token)
        size = BatchSize.of("auto", model)
        assert [size.rows(length) for length in (1, 64, 10**6)] == [min(512, expected), max(1, expected // 64), 1]
    assert BatchSize.of(7, model).rows(10**6) == 7


def test_long_sequences_do_not_cap_short_ones() -> None:
    size = BatchSize(tokens=65536)
    assert (size.rows(100), size.rows(8192)) == (512, 8)
    size.halve(8, 8192)
    assert (size.rows(100), size.rows(8192)) == (327, 4)


@pytest.mark.parametrize("given", [0, -1, "foo", "1.5"])
def test_sizes_that_are_none(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"^batch_size: got .*, allowed: auto, or a whole number from 1$"):
        BatchSize.of(given, load_model(GOLDEN / "llada_mha"))


def test_items_are_made_ahead_in_order() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(4):
            made.append(i)
            yield i
        raise ValueError("at the end")

    found: list[int] = []
    with pytest.raises(ValueError, match="at the end"):
        for item in ahead(items()):
            found.append(item)
    assert found == made == [0, 1, 2, 3]


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.name)
def test_every_familys_tokens_have_a_size(family: Family) -> None:
    config = family.config()
    assert bytes_per_token(config) > 4 * 8 * config.hidden_size
