"""The real model's tasks through lm-eval: which items, prompts word for word, and what counts as right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from starquant.config.model import ModelSpec
from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import LLaDASamplerSpec
from starquant.config.tasks import TasksSpec, validate_consent
from starquant.errors import ConfigError
from starquant.evaluation.harness import Evaluation, evaluate
from starquant.evaluation.lm import DiffusionLM
from starquant.evaluation.suites import is_own
from starquant.testbed.items import Split
from starquant.testbed.smol.tasks.items import TASKS, shipped
from tests.support.paths import REPOSITORY

METRICS = {"sums": "exact_match", "reading": "exact_match", "lists": "exact_match", "programs": "solved"}
NAMES = [f"smol_{task}{end}" for task in TASKS for end in ("", "_validation")]
SAMPLER = LLaDASamplerSpec(name="llada", gen_length=8, steps=8, block_length=8)
MODEL = ModelSpec(
    name="tiny",
    seed=0,
    dtype="float32",
    protocol=dict.fromkeys(NAMES, TaskProtocol(sampler=SAMPLER)),
    trajectory=SAMPLER,
)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Do not list the machine's packages after every task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture
def answered(tiny, tiny_tokenizer) -> Callable[..., Evaluation]:
    """Scores of a model that says what it is told to, by prompt."""

    class Oracle(DiffusionLM):
        def __init__(self, texts: dict[str, str]) -> None:
            super().__init__(tiny, tiny_tokenizer)
            self.texts = texts

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            assert all(request.args[1]["until"] == [] for request in requests)
            return [self.texts[request.args[0]] for request in requests]

    def run(texts: dict[str, str], *names: str, limit: int = 8) -> Evaluation:
        return evaluate(Oracle(texts), MODEL, TasksSpec(name="test", names=names, limit=limit))

    return run


@pytest.mark.parametrize(("end", "split"), [("", Split.TEST), ("_validation", Split.VALIDATION)])
def test_right_answers_score_one_on_the_items_of_the_split(
    answered: Callable[..., Evaluation], end: str, split: Split
) -> None:
    rows = [row for task in TASKS for row in shipped(task, split)[:8]]
    evaluation = answered({row["prompt"]: row["answer"] for row in rows}, *(f"smol_{task}{end}" for task in TASKS))
    scores = {(score.task, score.metric): (score.value, score.n) for score in evaluation.scores}
    assert scores == {(f"smol_{task}{end}", METRICS[task]): (1.0, 8) for task in TASKS}
    for task in TASKS:
        targets = [row["target"] for row in evaluation.items[f"smol_{task}{end}"]]
        answers = [row["answer"].strip() for row in shipped(task, split)[:8]]
        assert targets == [answer.split()[-1].rstrip(".") if task == "sums" else answer for answer in answers]


def test_texts_are_scored_one_by_one(answered: Callable[..., Evaluation]) -> None:
    texts: dict[str, str] = {}
    for task in TASKS:
        right, wrong, empty, more = shipped(task, Split.TEST)[:4]
        texts[right["prompt"]] = right["answer"].rstrip()
        texts[wrong["prompt"]] = {"sums": " The answer is 0.", "programs": "    return 'no'\n"}.get(task, " no, no")
        texts[empty["prompt"]] = ""
        texts[more["prompt"]] = more["answer"] + ("" if task == "programs" else "\nQuestion: What else?")
    evaluation = answered(texts, *(f"smol_{task}" for task in TASKS), limit=4)
    for task in TASKS:
        assert [row[METRICS[task]] for row in evaluation.items[f"smol_{task}"]] == [1, 0, 0, 1], task


def test_a_function_written_in_another_way_is_right_and_a_wrong_one_is_not(
    answered: Callable[..., Evaluation],
) -> None:
    row = next(
        row for row in shipped("programs", Split.TEST) if "(xs)" in row["prompt"] and "return sum(" in row["answer"]
    )
    expression = row["answer"].strip().removeprefix("return sum(").removesuffix(")")
    written = f"    total = 0\n    for y in [{expression}]:\n        total += y\n    return total\n"
    rows = shipped("programs", Split.TEST)
    limit = rows.index(row) + 1
    for text, solved in ((written, 1.0), (f"{written}    import os\n", 0.0)):
        texts = {other["prompt"]: "" for other in rows} | {row["prompt"]: text}
        evaluation = answered(texts, "smol_programs", limit=limit)
        assert [one["solved"] for one in evaluation.items["smol_programs"]][-1] == solved


def test_suites_name_tasks_that_are_the_packages_own_and_need_no_consent() -> None:
    for name, names in (("smol", NAMES[::2]), ("smol_validation", NAMES[1::2])):
        text = (REPOSITORY / f"conf/tasks/{name}.yaml").read_text()
        spec = TasksSpec.model_validate_json(json.dumps(yaml.safe_load(text)))
        assert (spec.name, list(spec.names)) == (name, names)
        assert is_own(spec)
        validate_consent(spec)


def test_a_misspelt_name_is_refused(answered: Callable[..., Evaluation]) -> None:
    with pytest.raises(ConfigError, match=r"no task 'smol_sum'\. Did you mean 'smol_sums'\?"):
        answered({}, "smol_sum")
