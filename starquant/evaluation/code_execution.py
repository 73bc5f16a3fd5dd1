"""pass@1 of generated Python programs, each run in the sandbox."""

from __future__ import annotations

from typing import Any

from starquant.evaluation.sandbox import run_program


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
    """Return {"pass@1": share of problems whose first program passes its tests}.

    Raises:
        ValueError: any other k; one program a problem is generated.
    """
    if k != [1]:
        raise ValueError(f"pass@k is computed for k = [1], got {k}")
    pairs = zip(predictions, references, strict=True)
    passed = [run_program(candidates[0] + "\n" + tests).passed for candidates, tests in pairs]
    return {"pass@1": sum(passed) / len(passed)}


def build_predictions(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Put each problem's prompt in front of its completions."""
    return [[doc["prompt"] + response for response in responses] for responses, doc in zip(resps, docs, strict=True)]
