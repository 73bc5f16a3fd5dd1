"""Shortcuts of evaluation in lm-eval's model class: what they give, and what they say they cost."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import LLaDASamplerSpec
from starquant.config.speed import SpeedSpec
from starquant.diffusion import LikelihoodEstimator, MaskPredictor, ScoreRequest, generate_approximately
from starquant.diffusion.noise import LLaDANoise
from starquant.errors import RecordError
from starquant.evaluation import lm as lm_module
from starquant.evaluation.lm import DiffusionLM
from starquant.evaluation.responses import ResponseLog
from starquant.models.cuda_graphs import compiled_blocks
from starquant.reports.across_seeds import read_rows
from starquant.reports.assembly import assemble
from starquant.reports.definitions import TABLES
from starquant.reports.frame import scores_frame
from starquant.reports.run_table import render
from starquant.reports.selection import read_runs
from starquant.reports.writing import markdown
from starquant.runs.execute import execute
from tests.support.specs import spec

LONG = [(f"describe {person} by city job pet :", " city oslo job baker pet cat") for person in ("ada", "ben", "eva")]
SHORT = [("what is the city of ada ?", " oslo")]
ASKED = [("1 + 2 =", {"until": []}), ("what is the city of ada ?", {"until": []})]
SAMPLER = TaskProtocol(sampler=LLaDASamplerSpec(name="llada", gen_length=8, block_length=8, steps=8))


def lm_of(tiny: Any, tokenizer: Any, protocol: TaskProtocol, speed: SpeedSpec) -> DiffusionLM:
    return DiffusionLM(tiny, tokenizer, protocol, speed=speed)


def scored(lm: DiffusionLM, pairs: list[Any]) -> list[float]:
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    return [value for value, _ in found]


def test_few_draws_are_two_halves_and_their_error(tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    lm = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=128), SpeedSpec(mc_num=8))
    lm.responses = ResponseLog(tmp_path / "answers.jsonl")
    found = scored(lm, LONG)
    encode, estimator = tiny_tokenizer.encode, LikelihoodEstimator(LLaDANoise(), 4)
    expected, squares = [], []
    for context, target in LONG:
        ids = tuple(encode(context)), tuple(encode(context + target)[len(encode(context)) :])
        a, b = (estimator.score(MaskPredictor(tiny), [ScoreRequest(*ids, repeat=part)])[0] for part in (0, 1))
        expected.append((a + b) / 2)
        squares.append(((a - b) / 2) ** 2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert lm.costs == {"mc_stderr": pytest.approx(math.sqrt(sum(squares) / 3), rel=1e-4)} and min(squares) > 0
    again = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=128), SpeedSpec(mc_num=8))
    again.responses = ResponseLog(tmp_path / "answers.jsonl")
    again.predict = SimpleNamespace(config=tiny.config)  # kept answers keep their halves: nothing is predicted
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


def test_generation_takes_the_shortcuts_it_is_told(
    tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = answered(lm_of(tiny, tiny_tokenizer, SAMPLER, SpeedSpec()))
    sure = SpeedSpec(confidence_threshold=1.0)  # nothing is that sure: one token a step, as the sampler
    assert answered(lm_of(tiny, tiny_tokenizer, SAMPLER, sure)) == exact
    seen: list[SpeedSpec] = []

    def spy(predict: Any, prompts: Any, sampler: Any, speed: SpeedSpec, **how: Any) -> Any:
        seen.append(speed)
        return generate_approximately(predict, prompts, sampler, speed, **how)

    monkeypatch.setattr(lm_module, "generate_approximately", spy)
    speed = SpeedSpec(confidence_threshold=0.3, kv_cache="dual", block_length=4)
    fast = answered(lm_of(tiny, tiny_tokenizer, SAMPLER, speed))
    assert seen == [speed] and len(fast) == len(exact)
    answered(lm_of(tiny, tiny_tokenizer, SAMPLER, SpeedSpec()))
    assert len(seen) == 1


def test_no_requests_cost_nothing(tiny: Any, tiny_tokenizer: Any) -> None:
    for speed in (SpeedSpec(mc_num=2), SpeedSpec(compile=True)):
        lm = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=4), speed)
        assert scored(lm, []) == [] and lm.costs == {}


def test_an_approximate_run_says_so_everywhere(tmp_path: Path) -> None:
    given = ("tasks.limit=3", "fidelity=none", "speed=dual_cache", "speed.block_length=4", "speed.mc_num=2")
    run = spec("tasks.names=[testbed_profiles,testbed_arithmetic]", f"paths.results={tmp_path}", *given)
    result = execute(run)
    assert result.record is not None and result.baseline is not None
    told = "dual KV cache, confidence threshold 0.9, blocks of 4, at most 2 draws"
    assert f"approximate evaluation: {told}" in render(result.record, result.baseline, result.path)
    costs = [score for score in result.record.scores if score.metric == "mc_stderr"]
    assert [(score.task, score.unit, score.value > 0) for score in costs] == [("testbed_profiles", "nats", True)]
    assert result.baseline.spec["speed"] == result.record.spec["speed"]
    exact = run.model_copy(update={"speed": SpeedSpec()})
    assert len({result.record.digest, result.baseline.digest, execute(exact).record.digest}) == 3
    with pytest.raises(RecordError, match="they are never mixed"):
        scores_frame(tmp_path)
    with pytest.raises(RecordError, match="they are never mixed"):
        read_rows(tmp_path, where={"tasks.limit": 3})
    table = TABLES["table1_main"]
    approximate = [one for one in read_runs(tmp_path) if one.speed.approximations]
    assert f"evaluated approximately ({told})" in markdown(table, assemble(table, approximate, ["dirty"]))


@pytest.mark.slow
def test_compiled_blocks_tell_their_difference(tiny: Any, tiny_tokenizer: Any) -> None:
    lm = lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=4), SpeedSpec(compile=True))
    plain = scored(lm_of(tiny, tiny_tokenizer, TaskProtocol(mc_num=4), SpeedSpec()), LONG)
    with compiled_blocks(tiny):
        assert all(block._compiled_call_impl is not None for block in tiny.trunk().blocks)
        assert scored(lm, LONG) == pytest.approx(plain, rel=1e-4)
        assert 0.0 <= lm.costs["compile_difference"] < 1e-3
        lm.protocol = SAMPLER
        answered(lm)
        assert lm.costs == {"compile_flips": 0.0}
    assert all(block._compiled_call_impl is None for block in tiny.trunk().blocks)
