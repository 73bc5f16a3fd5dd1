"""The held-out items of the embedded model's tasks, as lm-eval reads them.

Importing this module registers the model class, so that lm-eval's own command line, given one of the YAMLs in
`tasks/testbed/`, knows `--model starquant`.
"""

from __future__ import annotations

import functools
from typing import Any

from datasets import Dataset

from starquant.evaluation import command_line as _registers  # noqa: F401
from starquant.testbed.items import Item, Split, rng_for
from starquant.testbed.tiny import arithmetic, programs, world

ITEMS = 512  # a task and split


def items(task: str, split: Split) -> list[Item]:
    """Return the items of a task ("facts", "profiles", "arithmetic", "programs"), distinct and in a fixed order."""
    return list(_drawn(task, split))


@functools.cache
def _drawn(task: str, split: Split) -> tuple[Item, ...]:
    """Return the items, drawn once for all runs of a process: they do not change."""
    if task == "facts":
        return tuple(world.facts(split))
    draw = {
        "profiles": world.random_profile,
        "arithmetic": arithmetic.random_problem,
        "programs": programs.random_task,
    }[task]
    rng = rng_for("items", task, split.value)
    distinct: dict[str, Item] = {}
    while len(distinct) < ITEMS:
        item = draw(rng, split)
        distinct.setdefault(item.key, item)
    return tuple(distinct.values())


@functools.cache
def _splits(task: str) -> tuple[tuple[str, Any], ...]:
    """Return the rows of either split, made once for all runs of a process."""

    def row(item: Item) -> dict[str, Any]:
        return {
            "prompt": item.prompt,
            "answer": item.answer,
            "choices": list(item.choices),
            "label": item.choices.index(item.answer) if item.choices else -1,
            "hidden": [list(pair) for pair in item.hidden],
        }

    splits = (Split.VALIDATION, Split.TEST)
    return tuple((split.value, Dataset.from_list([row(item) for item in _drawn(task, split)])) for split in splits)


def _dataset(task: str) -> dict[str, Any]:
    return dict(_splits(task))


def facts(**_: Any) -> dict[str, Any]:
    """Dataset of testbed_facts."""
    return _dataset("facts")


def profiles(**_: Any) -> dict[str, Any]:
    """Dataset of testbed_profiles."""
    return _dataset("profiles")


def arithmetic_problems(**_: Any) -> dict[str, Any]:
    """Dataset of testbed_arithmetic."""
    return _dataset("arithmetic")


def program_tasks(**_: Any) -> dict[str, Any]:
    """Dataset of testbed_programs."""
    return _dataset("programs")


def score_program(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 when the generated program gives every hidden output, in the safe expression language."""
    pairs = [(int(x), int(y)) for x, y in doc["hidden"]]
    return {"solved": float(programs.solves(results[0], pairs))}
