"""The shipped items of the real model's tasks, as lm-eval reads them.

Importing this module registers the model class, so that lm-eval's own command line, given one of the YAMLs in
`tasks/smol/`, knows `--model starquant`.
"""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

from starquant.evaluation import command_line as _registers  # noqa: F401
from starquant.testbed.items import Split
from starquant.testbed.smol.tasks.items import shipped
from starquant.testbed.smol.tasks.scoring import final_number, is_right


def _dataset(task: str) -> dict[str, Any]:
    def columns(row: dict[str, Any]) -> dict[str, Any]:
        """Cases as text: a column of a dataset has one type."""
        target = (final_number(row["answer"]) if task == "sums" else None) or row["answer"].strip()
        return {**row, "target": target, "cases": json.dumps(row.get("cases"))}

    splits = (Split.VALIDATION, Split.TEST)
    return {split.value: Dataset.from_list([columns(row) for row in shipped(task, split)]) for split in splits}


def sums(**_: Any) -> dict[str, Any]:
    """Dataset of smol_sums."""
    return _dataset("sums")


def reading(**_: Any) -> dict[str, Any]:
    """Dataset of smol_reading."""
    return _dataset("reading")


def lists(**_: Any) -> dict[str, Any]:
    """Dataset of smol_lists."""
    return _dataset("lists")


def programs(**_: Any) -> dict[str, Any]:
    """Dataset of smol_programs."""
    return _dataset("programs")


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 when the answer's last number, of other tasks its first line, is the item's."""
    return {"exact_match": _score(doc, results)}


def score_program(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 when the function returns what the reference returns, interpreted as a subset of Python."""
    return {"solved": _score(doc, results)}


def _score(doc: dict[str, Any], results: list[str]) -> float:
    return float(is_right({**doc, "cases": json.loads(doc["cases"])}, results[0]))
