"""Items of the real model's four tasks, which of them training leaves out, and the files of those that are shipped.

    python -m starquant.testbed.smol.tasks.items --out DIR

writes the shipped files anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starquant.errors import one_line_errors, user_path
from starquant.testbed.items import Split, rng_for
from starquant.testbed.smol.tasks import lists, programs, reading, sums
from starquant.testbed.smol.tasks.python_subset import run_each

TASKS = ("sums", "reading", "lists", "programs")
#: Items of a shipped file.
COUNTS = {Split.VALIDATION: 128, Split.TEST: 256}
FOLDER = Path(__file__).with_name("items")
#: Draws in a row that bring no new item of a split: the task counts as exhausted.
MOST_MISSES = 5_000


@dataclass(frozen=True)
class Item:
    """A prompt and what the model is to write after it, down to the spaces.

    Attributes:
        entry_point: of programs, the function's name.
        args: of programs, what the function is called with, one a call.
    """

    task: str
    prompt: str
    answer: str
    entry_point: str | None = None
    args: tuple[Any, ...] = ()


def held_out(prompt: str) -> bool:
    """Whether training leaves a prompt out: 5 % of all, by their hash."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 13


def split_of(prompt: str) -> Split:
    """Return where a prompt may be used; half of the prompts held out are for validation."""
    if not held_out(prompt):
        return Split.TRAIN
    return Split.VALIDATION if hashlib.sha256(prompt.encode()).digest()[1] < 128 else Split.TEST


def stream(task: str, seed: int | str, count: int, split: Split) -> list[Item]:
    """Return distinct items of a split, the same on every machine.

    Raises:
        ValueError: the task has not as many.
    """
    rng = rng_for("smol", task, seed, split.value)
    distinct: dict[str, Item] = {}
    misses = 0
    while len(distinct) < count:
        item = _draw(task, rng)
        if split_of(item.prompt) is split and item.prompt not in distinct:
            distinct[item.prompt] = item
            misses = 0
            continue
        misses += 1
        if misses == MOST_MISSES:
            raise ValueError(f"{task} has only about {len(distinct)} items of split '{split.value}', not {count}")
    return list(distinct.values())


def _draw(task: str, rng: random.Random) -> Item:
    if task == "programs":
        program = programs.draw(rng)
        return Item(task, program.prompt, program.answer, program.entry_point, program.args)
    draw = {"sums": sums.draw, "reading": reading.draw, "lists": lists.draw}[task]
    return Item(task, *draw(rng))


def row(item: Item) -> dict[str, Any]:
    """Return an item as plain data; of programs with `cases`, (argument, what the reference returns)."""
    data = {"task": item.task, "prompt": item.prompt, "answer": item.answer}
    if item.entry_point is None:
        return data
    source = item.prompt + item.answer
    values = run_each(source, item.entry_point, item.args)
    cases = [[argument, value] for argument, value in zip(item.args, values, strict=True)]
    return {**data, "entry_point": item.entry_point, "cases": cases}


def shipped(task: str, split: Split) -> list[dict[str, Any]]:
    """Return the rows of a shipped file."""
    lines = (FOLDER / _file(task, split)).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write(folder: Path) -> None:
    """Write the files that are shipped."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for split, count in COUNTS.items():
            lines = [json.dumps(row(item)) + "\n" for item in stream(task, 0, count, split)]
            (folder / _file(task, split)).write_text("".join(lines), encoding="utf-8", newline="\n")


def _file(task: str, split: Split) -> str:
    return f"{task}_{split.value}.jsonl"


@one_line_errors(OSError)
def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the shipped items of the real model's tasks anew.")
    parser.add_argument("--out", type=user_path, required=True, help="folder of the files")
    write(parser.parse_args(arguments).out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
