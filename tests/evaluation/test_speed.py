"""Shortcuts of evaluation in lm-eval's model class: what they give, and what they say they cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from starquant.diffusion import LikelihoodEstimator, MaskPredictor, ScoreRequest
from starquant.diffusion.patterns import NOISES
from starquant.evaluation.lm import DiffusionLM
from starquant.evaluation.responses import ResponseLog
from starquant.models.loading import compiled_blocks
from starquant.protocol import LLaDASamplerSpec, TaskProtocol
from starquant.speed import SpeedSpec

LONG = [(f"describe {person} by city job pet :", " city oslo job baker pet cat") for person in ("ada", "ben", "eva")]
SHORT = [("what is the city of ada ?", " oslo")]
ASKED = [("1 + 2 =", {"until": []}), ("what is the city of ada ?", {"until": []})]
SAMPLER = TaskProtocol(sampler=LLaDASamplerSpec(name="llada", gen_length=8, block_length=8, steps=8))


def lm_of(tiny: Any, tokenizer: Any, protocol: TaskProtocol, speed: SpeedSpec) -> DiffusionLM:
    return DiffusionLM(tiny, tokenizer, protocol, progress=False, speed=speed)


def scored(lm: DiffusionLM, pairs: list[Any]) -> list[float]:
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    return [value for value, _ in found]


def test_few_draws_are_two_halves_and_their_error(tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    lm = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=128), SpeedSpec(mc_num=8))
    lm.responses = ResponseLog(tmp_path / "answers.jsonl")
    found = scored(lm, LONG)
    encode, estimator = tiny_tokenizer.encode, LikelihoodEstimator(NOISES["llada"], 4)
    expected, squares = [], []
    for context, target in LONG:
        ids = tuple(encode(context)), tuple(encode(context + target)[len(encode(context)) :])
        a, b = (estimator.score(MaskPredictor(tiny), [ScoreRequest(*ids, repeat=part)])[0] for part in (0, 1))
        expected.append((a + b) / 2)
        squares.append(((a - b) / 2) ** 2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert lm.costs == {"mc_stderr": pytest.approx(math.sqrt(sum(squares) / 3), rel=1e-4)} and min(squares) > 0
    again = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=128), SpeedSpec(mc_num=8))
    again.responses, again.predict = ResponseLog(tmp_path / "answers.jsonl"), None  # kept answers keep their halves
    assert scored(again, LONG) == found and again.costs == lm.costs


def test_short_targets_are_exact_all_the_same(tiny: Any, tiny_tokenizer: Any) -> None:
    few = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=128), SpeedSpec(mc_num=8))
    whole = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=128), SpeedSpec())
    assert scored(few, SHORT) == pytest.approx(scored(whole, SHORT), rel=1e-6)
    assert (few.costs, whole.costs) == ({"mc_stderr": 0.0}, {})
    plenty = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=4), SpeedSpec(mc_num=8))
    assert scored(plenty, LONG) == scored(lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=4), SpeedSpec()), LONG)


def answered(lm: DiffusionLM) -> list[str]:
    return lm.generate_until([Instance("generate_until", {}, one, i) for i, one in enumerate(ASKED)])


def test_generation_takes_the_shortcuts_it_is_told(tiny: Any, tiny_tokenizer: Any) -> None:
    exact = answered(lm_of(tiny, tiny_tokenizer, SAMPLER, SpeedSpec()))
    sure = SpeedSpec(confidence_threshold=1.0)  # nothing is that sure: one token a step, as the sampler
    assert answered(lm_of(tiny, tiny_tokenizer, SAMPLER, sure)) == exact
    fast = answered(lm_of(tiny, tiny_tokenizer, SAMPLER, SpeedSpec(confidence_threshold=1e-6)))
    assert len(fast) == len(exact) and all(isinstance(answer, str) for answer in fast)


@pytest.mark.slow
def test_compiled_blocks_tell_their_difference(tiny: Any, tiny_tokenizer: Any) -> None:
    lm = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=4), SpeedSpec(compile=True))
    plain = scored(lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=4), SpeedSpec()), LONG)
    with compiled_blocks(tiny):
        assert scored(lm, LONG) == pytest.approx(plain, rel=1e-4)
        assert 0.0 <= lm.costs["compile_difference"] < 1e-3
        lm.protocol = SAMPLER
        answered(lm)
        assert lm.costs == {"compile_flips": 0.0}
    assert all(block._compiled_call_impl is None for block in tiny.trunk().blocks)
