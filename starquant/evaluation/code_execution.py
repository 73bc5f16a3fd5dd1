"""pass@1 of generated Python programs, each run in the sandbox."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from starquant.config.tasks import EXECUTES_CODE, TasksSpec, validate_sandbox
from starquant.evaluation.sandbox.programs import run_program
from starquant.evaluation.sandbox.protection import protection

_AGREED = ContextVar("_AGREED", default=False)


class Program(str):
    """A prompt with a completion, which remembers the prompt: what it defines is the tests' own."""

    prompt: str = ""

    @classmethod
    def of(cls, prompt: str, completion: str) -> Program:
        """Join the two."""
        program = cls(prompt + completion)
        program.prompt = prompt
        return program


@contextmanager
def agreed_to(tasks: TasksSpec) -> Iterator[None]:
    """Let programs run behind walls that do not hold in full, where the specification agrees to that."""
    token = _AGREED.set(tasks.allow_weak_sandbox)
    try:
        yield
    finally:
        _AGREED.reset(token)


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
    """Return {"pass@1": share of problems whose first program passes its tests}.

    Raises:
        ValueError: any other k; one program a problem is generated.
        ConsentError: programs cannot be kept in here, and nobody has agreed to that.
    """
    if k != [1]:
        raise ValueError(f"pass@k is computed for k = [1], got {k}")
    validate_sandbox(EXECUTES_CODE, protection().missing(), _AGREED.get())
    passed = []
    for candidates, tests in zip(predictions, references, strict=True):
        program = candidates[0]
        prompt = program.prompt if isinstance(program, Program) else ""
        passed.append(run_program(program, tests, prompt=prompt).passed)
    return {"pass@1": sum(passed) / len(passed)}


def build_predictions(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[Program]]:
    """Put each problem's prompt in front of its completions."""
    return [
        [Program.of(doc["prompt"], response) for response in responses]
        for responses, doc in zip(resps, docs, strict=True)
    ]
