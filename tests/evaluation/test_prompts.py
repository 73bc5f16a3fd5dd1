"""Prompts that do not fit are cut, counted by item and said; text that becomes the model's [MASK] is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from starquant.config.model import ModelSpec
from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import LLaDASamplerSpec
from starquant.config.tasks import TasksSpec
from starquant.errors import ConfigError, DataError
from starquant.evaluation.command_line import StarquantLM
from starquant.evaluation.harness import evaluate
from starquant.evaluation.lm import DiffusionLM
from starquant.evaluation.prompts import CutItems
from starquant.packed.completion import Settings, completion
from starquant.testbed import folders

SCORES = TaskProtocol(mc_num=2)
WRITES = TaskProtocol(sampler=LLaDASamplerSpec(name="llada", gen_length=8, steps=1, block_length=8))
TRAJECTORY = LLaDASamplerSpec(name="llada", steps=8, gen_length=8, block_length=8)
MODEL = ModelSpec(
    name="tiny",
    seed=0,
    dtype="float32",
    protocol={"testbed_facts": SCORES, "testbed_arithmetic": WRITES},
    trajectory=TRAJECTORY,
)
WORDS = "ada has 7 coins . then buys 3 . how many ?".split()


def tasks(name: str, limit: int = 8) -> TasksSpec:
    return TasksSpec(name="test", names=(name,), limit=limit)


def text(words: int) -> str:
    return " ".join((WORDS * words)[:words])


def requests(kind: str, *arguments: tuple[str, Any]) -> list[Instance]:
    return [Instance(kind, {}, pair, 0, ("a_task", 10 + i, 1)) for i, pair in enumerate(arguments)]


def test_a_cut_prompt_keeps_its_beginning_of_text(tiny, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dream's prompts begin with one, and so do those that are cut."""
    monkeypatch.setattr(DiffusionLM, "_bos", 3)
    ids = tiny_tokenizer(text(300), add_special_tokens=False)["input_ids"]
    lm = DiffusionLM(tiny, tiny_tokenizer, WRITES)
    assert lm._prompts(requests("generate_until", (text(300), {})), 8) == [[3, *ids[-247:]]]
    lm = DiffusionLM(tiny, tiny_tokenizer, SCORES)
    (request,) = lm._score_requests(requests("loglikelihood", (text(300), " oslo")), append_eos=False)
    assert request.prompt == (3, *ids[-254:]) and len(request.target) == 1


def test_items_count_once_however_many_requests_they_have(tiny, tiny_tokenizer) -> None:
    """Words are tokens, 256 of them the context: an answer of 8 leaves 248, one of 4 to score leaves 252."""
    lm = DiffusionLM(tiny, tiny_tokenizer, WRITES)
    lm.generate_until(requests("generate_until", (text(248), {}), (text(249), {}), (text(300), {})))
    assert lm.cut.shares() == {"cut_prompts": 2 / 3}
    lm = DiffusionLM(tiny, tiny_tokenizer, SCORES)
    pairs = [(text(252), " 1 , 2 ,"), (text(253), " 1 , 2 ,"), ("ada", " " + text(257)), ("ada", " oslo")]
    scored = requests("loglikelihood", *pairs)
    lm.loglikelihood([*scored, Instance("loglikelihood", {}, (text(253), " 1 , 2 , 3"), 1, ("a_task", 11, 1))])
    assert lm.cut.shares() == {"cut_prompts": 2 / 4, "cut_answers": 1 / 4}


def test_nothing_is_counted_where_everything_fits(tiny, tiny_tokenizer) -> None:
    lm = DiffusionLM(tiny, tiny_tokenizer, WRITES)
    lm.generate_until(requests("generate_until", ("ada", {}), (text(248), {})))
    assert lm.cut.shares() == {}
    assert list(lm.cut.sentences("a_task", 256)) == []


def test_processes_count_their_items_together() -> None:
    a, b = CutItems(), CutItems()
    a.add(("t", 0), cut_prompts=True)
    a.add(("t", 2), cut_prompts=False)
    b.add(("t", 1), cut_prompts=True)
    b.add(("t", 2), cut_prompts=False)  # lm-eval repeats an item where processes have unlike numbers
    assert (a | b).shares() == {"cut_prompts": 2 / 3}


@pytest.mark.parametrize("task", ["testbed_facts", "testbed_arithmetic"])
def test_a_run_says_it_once_a_task_and_records_it(
    tiny, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path, task: str
) -> None:
    """Scored again from kept answers, the counts are the same."""
    room = 7 if task == "testbed_facts" else 30
    monkeypatch.setattr(tiny.config, "max_sequence_length", room)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "starquant"):
            evaluation = evaluate(DiffusionLM(tiny, tiny_tokenizer), MODEL, tasks(task), tmp_path)
        score, share = evaluation.scores
        assert score.metric in ("acc", "exact_match")
        assert (share.task, share.metric, share.filter, share.n) == (task, "cut_prompts", "prompts", 8)
        assert 0 < share.value <= 1
        [line] = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"{task}: of {8 * share.value:.0f} of 8 items, prompts do not fit")
        assert f"context of {room} tokens" in line
        assert line.endswith("(cut_prompts)")


def test_a_run_whose_prompts_fit_says_nothing(tiny, tiny_tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "starquant"):
        evaluation = evaluate(DiffusionLM(tiny, tiny_tokenizer), MODEL, tasks("testbed_facts", limit=2))
    assert [score.metric for score in evaluation.scores] == ["acc"]
    assert caplog.records == []


def test_lm_evals_own_command_says_it_a_line_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    lm = StarquantLM(path="tiny", mc_num=2, device="cpu", gen_length=8, block_length=8, steps=1)
    asked = requests("generate_until", (text(300), {}), ("ada", {}))
    asked.append(Instance("generate_until", {}, (text(300), {}), 0, ("b_task", 0, 1)))
    lm.generate_until(asked)
    lm.loglikelihood(requests("loglikelihood", ("ada", " oslo")))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "warning: a_task: of 1 of 2 items",
        "warning: b_task: of 1 of 1 items",
    ]
    assert lm.get_model_info() == {"cut": {"a_task": {"cut_prompts": 0.5}, "b_task": {"cut_prompts": 1.0}}}


@pytest.mark.parametrize(
    "ask",
    [
        lambda lm: lm.generate_until(requests("generate_until", ("ada", {}), ("ada [MASK] 7", {}))),
        lambda lm: lm.generate_until(requests("generate_until", ("ada", {}), (f"[MASK] {text(300)}", {}))),
        lambda lm: lm.loglikelihood(requests("loglikelihood", ("ada", " 1"), ("ada [MASK]", " oslo"))),
        lambda lm: lm.loglikelihood(requests("loglikelihood", ("ada", " 1"), ("ada", " [MASK] oslo"))),
    ],
    ids=["generation", "in what is cut", "likelihood", "answer"],
)
def test_a_mask_token_in_a_text_names_its_task_and_item(
    tiny, tiny_tokenizer, ask: Callable[[DiffusionLM], Any]
) -> None:
    lm = DiffusionLM(tiny, tiny_tokenizer, WRITES)
    lm._protocol = lambda needs: WRITES if needs == "sampler" else SCORES  # type: ignore[method-assign]
    lm.predict.chunks = None  # type: ignore[assignment]  # refused before any pass
    with pytest.raises(DataError, match=r"^a_task, item 11: its text holds '\[MASK\]', which .* mask token \(id 1\)"):
        ask(lm)


def test_generate_refuses_a_mask_token_and_a_prompt_that_leaves_no_room() -> None:
    settings = Settings(length=8, steps=1)
    folder = str(folders.testbed_folder("tiny", 0))
    with pytest.raises(ConfigError, match=r"^prompt: it holds '\[MASK\]', which .* \(id 1\); allowed: text without"):
        completion(folder, "ada [MASK] 7", settings)
    with pytest.raises(ConfigError, match=r"^prompt: got 249 tokens, allowed: at most 248 beside an answer of 8 in"):
        completion(folder, text(249), settings)
    with pytest.raises(ConfigError, match=r"^prompt: got no tokens, allowed: 1 or more"):
        completion(folder, "", settings)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"length": 0}, "--length: got 0, allowed: 1 to 100000"),
        ({"block_length": 100_001}, "--block-length: got 100001, allowed: 1 to 100000"),
        ({"temperature": float("nan")}, "--temperature: got nan, allowed: 0 or more"),
        ({"graphs": True}, "--graphs: got --device cpu, allowed: a GPU"),
    ],
)
def test_settings_of_an_answer_are_judged_before_a_model_is_read(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        Settings(**wrong)
