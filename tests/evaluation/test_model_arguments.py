"""What lm-eval's command line passes to the model class: nothing is ignored, nothing is guessed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from starquant.errors import ConfigError
from starquant.evaluation import __main__ as command
from starquant.evaluation.command_line import StarquantLM
from tests.support.paths import GOLDEN

LM_EVALS = {"batch_size": "1", "max_batch_size": None, "device": "cpu"}  # what it adds of its own options


def made(**arguments: Any) -> StarquantLM:
    return StarquantLM.create_from_arg_obj(arguments, LM_EVALS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "path: missing; needed: path=DIR"),
        ({"pretrained": "x"}, r"pretrained: unknown key; .*Did you mean 'path'\?"),
        ({"model_path": "x"}, r"model_path: unknown key; .*Did you mean 'path'\?"),
        ({"path": "tiny", "mc_nun": 8}, r"mc_nun: unknown key; .*Did you mean 'mc_num'\?"),
        ({"path": "tiny", "trust_remote_code": True}, "trust_remote_code: unknown key"),
        ({"path": "tiny", "mc_num": 1.5}, "mc_num: got 1.5, allowed: valid integer"),
        ({"path": "tiny", "mc_num": True}, "mc_num: got True, allowed: valid integer"),
        ({"path": "tiny", "mc_num": 0}, "mc_num: got 0, allowed: greater than or equal to 1"),
        ({"path": "tiny", "temperature": float("nan")}, "temperature: got nan"),
        ({"path": "tiny", "dtype": "float8"}, "dtype: got 'float8', allowed: float32"),
        ({"path": "tiny", "batch_size": "auto4"}, "batch_size: got 'auto4', allowed: auto"),
        ({"path": "tiny", "alg": "entropy"}, "alg: got 'entropy', but llada has no such setting"),
        ({"path": "tiny", "device": "cuda:77"}, "device: 'cuda:77' cannot be used here"),
        ({"path": "tiny", "block_length": 7}, "block_length: got 7, must divide"),
    ],
)
def test_what_it_does_not_know_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**arguments)


def test_every_problem_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        made(pretrained="x", steps="many")
    assert [line.partition(": ")[2].partition(":")[0] for line in str(caught.value).splitlines()] == [
        *("path", "steps", "pretrained"),
    ]


def test_arguments_win_over_lm_evals_options_and_reach_the_sampler() -> None:
    lm = StarquantLM.create_from_arg_string("path=tiny,gen_length=16,block_length=8,seed=3", LM_EVALS)
    sampler = lm._sampler()
    assert (sampler.answer_length, sampler.own_block_length, lm.seed) == (16, 8, 3)
    assert made(path="tiny", batch_size="auto:4").batch_size.rows(1) > made(path="tiny").batch_size.rows(1) == 1


def request(**gen_kwargs: Any) -> Instance:
    return Instance("generate_until", {}, ("ada", {"until": ["."], **gen_kwargs}), 0)


def test_a_temperature_that_nobody_reads_is_refused() -> None:
    lm = made(path="tiny", gen_length=8)
    greedy = [request(), request(temperature=0.0), request(temperature=0.7, do_sample=False)]
    assert len(set(lm.generate_until(greedy, disable_tqdm=True))) == 1
    with pytest.raises(ConfigError, match=r"wants temperature 0\.7, --model_args: temperature is 0\.0"):
        lm.generate_until([request(temperature=0.7)], disable_tqdm=True)


def test_guidance_that_a_family_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    monkeypatch.setattr("starquant.evaluation.command_line.load_tokenizer", lambda folder: tiny_tokenizer)
    lm = made(path=str(GOLDEN / "dream_gqa"), cfg_scale=1.5, gen_length=8, alg="origin")
    assert lm._sampler().alg == "origin"
    with pytest.raises(ConfigError, match=r"cfg_scale: got 1\.5, but dream generates without"):
        lm.generate_until([request()], disable_tqdm=True)


RUN = ("run", "--model", "starquant", "--model_args", "path=tiny", "--tasks", "testbed_facts")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--gen_kwargs", "temperature=0.5"), "--gen_kwargs: got temperature"),
        (("--config", "nowhere.yaml"), "lm-eval: Config file not found"),
    ],
)
def test_options_that_nobody_reads_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lm_eval", *RUN, *more])
    assert command.main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
