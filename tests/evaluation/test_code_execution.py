"""pass@1 of generated programs, on toy problems and on HumanEval's own solutions."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from starquant.config.tasks import TasksSpec
from starquant.errors import ConsentError
from starquant.evaluation import code_execution
from starquant.evaluation.code_execution import agreed_to, build_predictions, pass_at_k
from starquant.evaluation.sandbox.protection import Protection
from starquant.evaluation.sandbox.walls import Walls

GOOD, BAD = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"
TESTS = "def check(f):\n    assert f(2, 3) == 5\ncheck(add)"


@pytest.mark.parametrize(
    ("candidates", "share"),
    [
        ([[GOOD]], 1.0),
        ([[BAD]], 0.0),
        ([[GOOD], [BAD], [BAD], [GOOD + "\n"]], 0.5),
        ([["def add(a, b):\n    return"], [GOOD], ["exit(0)"], [""]], 0.25),
    ],
)
def test_the_share_of_problems_that_pass(candidates: list[list[str]], share: float) -> None:
    assert pass_at_k([TESTS] * len(candidates), candidates, k=[1]) == {"pass@1": share}


def test_each_program_meets_its_own_tests() -> None:
    other = "def check(f):\n    assert f(2, 3) == -1\ncheck(add)"
    assert pass_at_k([TESTS, other], [[GOOD], [BAD]], k=[1])["pass@1"] == 1.0
    assert pass_at_k([other, TESTS], [[GOOD], [BAD]], k=[1])["pass@1"] == 0.0


@pytest.mark.parametrize("k", [[], [10], [1, 10], [0]])
def test_any_other_k_is_refused(k: list[int]) -> None:
    with pytest.raises(ValueError, match=r"k = \[1\]"):
        pass_at_k([TESTS], [[GOOD]], k=k)


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError):
        pass_at_k([TESTS, TESTS], [[GOOD]], k=[1])
    with pytest.raises(ValueError):
        build_predictions([["x"]], [])


def test_predictions_are_prompt_and_completion() -> None:
    docs = [{"prompt": "def f():\n"}, {"prompt": "def g():\n"}]
    built = build_predictions([["    return 1", "    return 2"], ["    pass"]], docs)
    assert built == [["def f():\n    return 1", "def f():\n    return 2"], ["def g():\n    pass"]]


def test_an_open_sandbox_needs_a_second_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = Protection(Walls("none", False), False, True, False, True, True)
    monkeypatch.setattr(code_execution, "protection", lambda: weak)
    tasks = TasksSpec(name="t", names=("humaneval",), allow_code_execution=True)
    message = (
        r"^tasks\.allow_weak_sandbox: humaneval runs .* here the sandbox is open: network, files \(.* got false, set"
    )
    for context in (contextlib.nullcontext(), agreed_to(tasks)):
        with context, pytest.raises(ConsentError, match=message):
            pass_at_k([TESTS], [[GOOD]], k=[1])
    with agreed_to(tasks.model_copy(update={"allow_weak_sandbox": True})):
        assert pass_at_k([TESTS], [[GOOD]], k=[1]) == {"pass@1": 1.0}


@pytest.fixture
def problems(benchmark_data: Path) -> list[dict[str, Any]]:
    lines = (benchmark_data / "humaneval" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:10]]


def _score(problems: list[dict[str, Any]], completions: list[str]) -> float:
    predictions = build_predictions([[completion] for completion in completions], problems)
    references = [f"{doc['test']}\ncheck({doc['entry_point']})" for doc in problems]
    return pass_at_k(references, predictions, k=[1])["pass@1"]


def test_humaneval_solutions_pass(problems: list[dict[str, Any]]) -> None:
    assert _score(problems, [doc["canonical_solution"] for doc in problems]) == 1.0


@pytest.mark.parametrize("completion", ["", "    pass\n", "    raise NotImplementedError\n"])
def test_humaneval_without_a_solution_fails(problems: list[dict[str, Any]], completion: str) -> None:
    assert _score(problems, [completion] * len(problems)) == 0.0
