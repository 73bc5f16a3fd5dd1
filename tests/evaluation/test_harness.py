"""lm-eval end to end: what a run reports, which items it scores, consent, groups, and resumption."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.api.task
import pytest

from starquant.config.model import ModelSpec
from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import LLaDASamplerSpec
from starquant.config.tasks import TasksSpec
from starquant.errors import ConfigError, ConsentError
from starquant.evaluation.harness import Evaluation, evaluate, parse_scores
from starquant.evaluation.lm import DiffusionLM
from starquant.evaluation.testbed_tasks import items
from starquant.session.progress import Progress
from starquant.testbed.items import Split

METRICS = {
    "testbed_facts": ("acc", "none"),
    "testbed_profiles": ("acc", "none"),
    "testbed_arithmetic": ("exact_match", "last-number"),
    "testbed_programs": ("solved", "none"),
}
WRITES = TaskProtocol(sampler=LLaDASamplerSpec(name="llada", gen_length=8, steps=8, block_length=8))
PROTOCOL = {
    "testbed_facts": TaskProtocol(mc_num=4),
    "testbed_profiles": TaskProtocol(mc_num=4),
    "testbed_arithmetic": WRITES,
    "testbed_programs": WRITES,
    "humaneval": WRITES,
    "mmlu": TaskProtocol(mc_num=4, num_fewshot=5),
}
TRAJECTORY = LLaDASamplerSpec(name="llada", steps=8, gen_length=8, block_length=8)
MODEL = ModelSpec(name="tiny", seed=0, dtype="float32", protocol=PROTOCOL, trajectory=TRAJECTORY)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Do not list the machine's packages after every task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


class Oracle(DiffusionLM):
    """Gives the answers it is told, without a model."""

    def __init__(self, tiny: Any, tokenizer: Any, answer: Callable[..., Any]) -> None:
        super().__init__(tiny, tokenizer)
        self.answer, self.asked = answer, list[Any]()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.asked += [request.args for request in requests]
        return [(self.answer(*request.args), False) for request in requests]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.asked += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_over_prompts_has_the_tasks_name_and_is_the_runs(
    shown: bool, tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.api.task.tqdm", pytest.fail)  # lm-eval's own, which has no name
    oracle = Oracle(tiny, tiny_tokenizer, lambda *_: 0.0)
    oracle.progress = Progress(shown)
    evaluate(oracle, MODEL, tasks("testbed_facts"))
    assert ("testbed_facts, prompts: " in capsys.readouterr().err) is shown
    assert lm_eval.api.task.tqdm is pytest.fail


def tasks(*names: str, **settings: Any) -> TasksSpec:
    return TasksSpec(name="test", names=names, **({"limit": 8} | settings))


def value(evaluation: Evaluation, metric: str) -> float:
    [score] = [s for s in evaluation.scores if s.metric == metric]
    return score.value


@pytest.fixture(scope="module")
def evaluation(tiny, tiny_tokenizer) -> Evaluation:
    """The embedded suite, eight items a task, and no answers kept."""
    return evaluate(DiffusionLM(tiny, tiny_tokenizer), MODEL, tasks(*METRICS))


def test_scores_are_complete(evaluation: Evaluation) -> None:
    assert [score.task for score in evaluation.scores] == list(METRICS)
    for score in evaluation.scores:
        assert (score.metric, score.filter) == METRICS[score.task]
        assert 0 <= score.value <= 1
        assert (score.value * 8).is_integer()
        assert score.stderr is not None
        assert score.stderr == pytest.approx((score.value * (1 - score.value) / 7) ** 0.5)
        assert score.n == 8
        assert score.higher_is_better is True
        assert score.task_version == "1.0"
        assert score.num_fewshot == 0


def test_there_is_a_row_for_every_item(evaluation: Evaluation) -> None:
    assert list(evaluation.items) == list(METRICS)
    for score in evaluation.scores:
        rows = evaluation.items[score.task]
        assert [row["doc_id"] for row in rows] == list(range(8))
        assert sum(row[score.metric] for row in rows) / 8 == score.value
        assert "doc" not in rows[0]
    json.dumps(evaluation.items)


@pytest.mark.parametrize("task", METRICS)
def test_test_items_are_scored(evaluation: Evaluation, task: str) -> None:
    tested = items(task.removeprefix("testbed_"), Split.TEST)[:8]
    wanted = [item.choices.index(item.answer) if item.choices else item.answer for item in tested]
    if task == "testbed_arithmetic":
        wanted = [answer.split()[-1] for answer in wanted]
    assert [row["target"] for row in evaluation.items[task]] == wanted


def _oracle(tiny: Any, tokenizer: Any, right: bool) -> Oracle:
    answers = {
        item.prompt: item.answer for task in METRICS for item in items(task.removeprefix("testbed_"), Split.TEST)[:8]
    }

    def answer(prompt: str, choice: str | None = None) -> Any:
        if choice is not None:
            return -1.0 if (choice == f" {answers[prompt]}") is right else -9.0
        return answers[prompt] if right else "99 99"

    return Oracle(tiny, tokenizer, answer)


@pytest.mark.parametrize("right", [True, False])
def test_right_answers_score_one_and_wrong_ones_zero(tiny, tiny_tokenizer, right: bool) -> None:
    evaluation = evaluate(_oracle(tiny, tiny_tokenizer, right), MODEL, tasks(*METRICS))
    assert {score.task: score.value for score in evaluation.scores} == dict.fromkeys(METRICS, float(right))


def test_only_the_last_number_of_an_arithmetic_answer_counts(tiny, tiny_tokenizer) -> None:
    targets = [item.answer.split()[-1] for item in items("arithmetic", Split.TEST)[:4]]
    prompts = [item.prompt for item in items("arithmetic", Split.TEST)[:4]]
    texts = [f"0 , 0 , {targets[0]}", f"{targets[1]} , x", f"{targets[2]} , 99", "no number"]
    oracle = Oracle(tiny, tiny_tokenizer, dict(zip(prompts, texts, strict=True)).__getitem__)
    evaluation = evaluate(oracle, MODEL, tasks("testbed_arithmetic", limit=4))
    assert [row["exact_match"] for row in evaluation.items["testbed_arithmetic"]] == [1, 1, 0, 0]


def test_any_program_that_gives_the_hidden_outputs_counts(tiny, tiny_tokenizer) -> None:
    problem = items("programs", Split.TEST)[0]
    for text, solved in ((f"( {problem.answer} ) * 1 + 0", 1), ("x x", 0), ("", 0), ("5", 0)):
        oracle = Oracle(tiny, tiny_tokenizer, lambda _, text=text: text)
        assert value(evaluate(oracle, MODEL, tasks("testbed_programs", limit=1)), "solved") == solved


def test_a_finished_run_is_not_repeated(tiny, tiny_tokenizer, evaluation: Evaluation, tmp_path: Path) -> None:
    first = evaluate(DiffusionLM(tiny, tiny_tokenizer), MODEL, tasks(*METRICS), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{task}.jsonl" for task in METRICS}
    lm = DiffusionLM(tiny, tiny_tokenizer)
    lm.predict = SimpleNamespace(config=tiny.config)  # any forward pass fails
    assert evaluate(lm, MODEL, tasks(*METRICS), tmp_path) == first
    assert first.scores == evaluation.scores


class Untouchable:
    """Nothing may be asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


@pytest.mark.parametrize("names", [("humaneval",), ("testbed_facts", "humaneval")])
def test_code_is_not_run_without_consent(names: tuple[str, ...]) -> None:
    untouchable: Any = Untouchable()
    with pytest.raises(ConsentError, match=r"tasks\.allow_code_execution: humaneval .* got false"):
        evaluate(untouchable, untouchable, tasks(*names))


def test_an_unknown_task_is_refused(tiny, tiny_tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.names\.1: .*'testbed_fact'\. Did you mean 'testbed_facts'\?"):
        evaluate(DiffusionLM(tiny, tiny_tokenizer), MODEL, tasks("testbed_programs", "testbed_fact"))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of local data, whose conversion is cached in a temporary place."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "data"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_humaneval_programs_are_run_with_consent(tiny, tiny_tokenizer, data: Path) -> None:
    tests = "def check(f):\n    assert f(3) == {}\n"
    rows = [
        {"task_id": f"t/{i}", "prompt": f"def f{i}(x):\n", "test": tests.format(3 + i), "entry_point": f"f{i}"}
        for i in range(4)
    ]
    _write(data / "humaneval/test.jsonl", rows)
    completions = ["    return x", "    return x + 1", "    return x + 1", "    exit(0)"]
    answers = {row["prompt"]: text for row, text in zip(rows, completions, strict=True)}
    spec = tasks("humaneval", data_dir=str(data), allow_code_execution=True)
    evaluation = evaluate(Oracle(tiny, tiny_tokenizer, answers.__getitem__), MODEL, spec)
    [score] = evaluation.scores
    assert (score.metric, score.filter, score.value, score.n) == ("pass@1", "create_test", 0.5, 4)


def test_a_group_is_the_mean_over_items(tiny, tiny_tokenizer, data: Path) -> None:
    sizes = {"anatomy": 3, "virology": 1}
    for subject, size in sizes.items():
        for split, count in (("dev", 5), ("test", size)):
            rows = [{"question": f"{subject} {split} {i}", "choices": list("wxyz"), "answer": 2} for i in range(count)]
            _write(data / f"mmlu/{split}/{subject}.jsonl", rows)

    def answer(prompt: str, choice: str) -> float:
        return float(choice == (" C" if "anatomy" in prompt else " D"))

    oracle = Oracle(tiny, tiny_tokenizer, answer)
    evaluation = evaluate(oracle, MODEL, tasks("mmlu", data_dir=str(data)))
    scores = {score.task: score for score in evaluation.scores if score.metric == "acc"}
    assert list(scores) == ["mmlu", "mmlu_anatomy", "mmlu_virology"]  # the group first
    assert [score.value for score in scores.values()] == [0.75, 1.0, 0.0]
    assert [score.n for score in scores.values()] == [4, 3, 1]
    assert [score.num_fewshot for score in scores.values()] == [5, 5, 5]
    assert [score.higher_is_better for score in scores.values()] == [True, True, True]
    assert all(score.task_version is not None for score in scores.values())
    assert set(evaluation.items) == {"mmlu_anatomy", "mmlu_virology"}
    for prompt, _ in oracle.asked:
        assert re.findall(r" dev (\d)", prompt) == ["0", "1", "2", "3", "4"]
        assert prompt.count("Answer: C") == 5
        assert prompt.endswith("Answer:")


def _result() -> dict[str, Any]:
    """What lm-eval returns for a group of two tasks."""
    return {
        "results": {
            "b_task": {
                "alias": " - b",
                "name": "b_task",
                "sample_len": 10,
                "acc,none": 0.4,
                "acc_stderr,none": 0.1,
                "em,strict": 1,
                "em_stderr,strict": "N/A",
                "em,loose": 0.9,
                "em_stderr,loose": 0.05,
            },
            "a_task": {"alias": " - a", "acc,none": 0.1, "acc_stderr,none": "N/A"},
            "c_group": {"alias": "c", "acc,none": 0.3, "acc_stderr,none": 0.07},
        },
        "n-samples": {
            "a_task": {"original": 99, "effective": 5},
            "b_task": {"original": 99, "effective": 10},
        },
        "n-shot": {"a_task": 5, "b_task": 5},
        "versions": {"a_task": 1.0, "b_task": "2", "c_group": 3},
        "higher_is_better": {"a_task": {"acc": True}, "b_task": {"acc": True, "em": False}, "c_group": {"acc": True}},
    }


def test_every_metric_and_filter_of_a_result_is_kept() -> None:
    scores = parse_scores(_result(), "c_group")
    rows = [(s.task, s.metric, s.filter, s.value, s.stderr, s.n, s.higher_is_better, s.task_version) for s in scores]
    assert rows == [
        ("c_group", "acc", "none", 0.3, 0.07, 15, True, "3"),
        ("a_task", "acc", "none", 0.1, None, 5, True, "1.0"),
        ("b_task", "acc", "none", 0.4, 0.1, 10, True, "2"),
        ("b_task", "em", "strict", 1.0, None, 10, False, "2"),
        ("b_task", "em", "loose", 0.9, 0.05, 10, False, "2"),
    ]
    assert {s.num_fewshot for s in scores} == {5}


def test_what_a_result_leaves_out_is_none() -> None:
    result = _result()
    result["versions"], result["higher_is_better"], result["n-shot"] = {}, {}, {}
    for score in parse_scores(result, "c_group"):
        assert (score.task_version, score.higher_is_better, score.num_fewshot) == (None, None, None)
