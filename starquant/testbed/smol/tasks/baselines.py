"""What guessing and copying score on the real model's test items, without a model.

    python -m starquant.testbed.smol.tasks.baselines

Guesses know the form of an answer: another problem's number, the facts of somebody in the passage, as many words of
the list as are wanted, another function's body.
"""

from __future__ import annotations

import argparse
import random
import re
from typing import Any

from starquant.testbed.items import Split, rng_for
from starquant.testbed.smol.tasks.items import TASKS, shipped
from starquant.testbed.smol.tasks.reading import ATTRIBUTES
from starquant.testbed.smol.tasks.scoring import is_right
from starquant.testbed.smol.tasks.words import NAMES

Row = dict[str, Any]
#: Guesses an item.
GUESSES = 20
COPIES = {
    "sums": "the prompt's last number",
    "reading": "the facts of who comes last",
    "lists": "the list as it is",
    "programs": "`return` of the argument",
}
_VALUES = {"name": NAMES} | {attribute.noun: attribute.values for attribute in ATTRIBUTES.values()}


def guess(row: Row, others: list[Row], rng: random.Random) -> str:
    """Return a random answer of the right form; `others` are other items of the task."""
    if row["task"] == "sums":
        return str(rng.choice(others)["answer"])
    if row["task"] == "reading":
        return ", ".join(rng.choice(_facts(row["prompt"])))
    if row["task"] == "lists":
        return ", ".join(rng.sample(_words(row["prompt"]), row["answer"].count(",") + 1))
    parameter = _parameter(row["prompt"])
    return str(rng.choice([other["answer"] for other in others if _parameter(other["prompt"]) == parameter]))


def copied(row: Row) -> str:
    """Return what is read off the prompt without thought."""
    prompt = row["prompt"]
    if row["task"] == "sums":
        return f"The answer is {re.findall('[0-9]+', prompt)[-1]}."
    if row["task"] == "reading":
        return ", ".join(_facts(prompt)[-1])
    if row["task"] == "lists":
        return ", ".join(_words(prompt))
    return f"    return {_parameter(prompt)}\n"


def _facts(prompt: str) -> list[tuple[str, ...]]:
    """Return the two facts that are wanted, of everybody in the passage."""
    passage, question = prompt.split("\nQuestion: ")
    nouns = re.findall("the ([a-z ]+?) (?:and|of) ", question)[:2]
    words = list(dict.fromkeys(re.findall(r"\w+", passage)))
    return list(zip(*([word for word in words if word in _VALUES[noun]] for noun in nouns), strict=True))


def _words(prompt: str) -> list[str]:
    return re.split(", ", re.sub("[.?]\nAnswer:", "", prompt.rpartition(": ")[2]))


def _parameter(prompt: str) -> str:
    return prompt.partition("(")[2].partition(")")[0]


def baselines(task: str) -> tuple[float, float]:
    """Return the shares of test items that guessing and copying get right."""
    rows, others = shipped(task, Split.TEST), shipped(task, Split.VALIDATION)
    rng = rng_for("baselines", task)
    guesses = [is_right(row, guess(row, others, rng)) for row in rows for _ in range(GUESSES)]
    return _share(guesses), _share([is_right(row, copied(row)) for row in rows])


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def table() -> str:
    """Return a Markdown table, in %."""
    lines = ["| task | a guess | a copy | of what |", "|---|---|---|---|"]
    for task in TASKS:
        guessed, copy = baselines(task)
        lines.append(f"| {task} | {100 * guessed:.1f} | {100 * copy:.1f} | {COPIES[task]} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description="Print what guessing and copying score on the test items.").parse_args()
    print(table())


if __name__ == "__main__":
    main()
