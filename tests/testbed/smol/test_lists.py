"""Instructions about lists: followed anew, they give the answer, and no other answer follows them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from starquant.testbed.items import Split
from starquant.testbed.smol.tasks.items import stream
from starquant.testbed.smol.tasks.lists import INSTRUCTIONS, WORDS

ITEMS = stream("lists", "test", 1_500, Split.TRAIN)
ORDINALS = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5}


def _initial(words: list[str], letter: str) -> list[str]:
    chosen = [word for word in words if word.startswith(letter)]
    assert len(chosen) == 1, "several orders would be right"
    return chosen


def _without(words: list[str], word: str) -> list[str]:
    words.remove(word)
    assert word not in words, "one of them or both?"
    return words


FOLLOWED: dict[str, Callable[[list[str], str], list[str]]] = {
    r"Put these words in alphabetical order()": lambda words, _: sorted(words),
    r"Write these words in reverse order()": lambda words, _: list(reversed(words)),
    r"What is the (\w+) word of this list": lambda words, which: [words[ORDINALS[which]]],
    r"Remove (\w+) from this list": _without,
    r"Write the first two words of this list()": lambda words, _: [words[0], words[1]],
    r"Write the last two words of this list()": lambda words, _: [words[len(words) - 2], words[len(words) - 1]],
    r"Swap the first and the last word of this list()": lambda words, _: [words.pop(), *words[1:], words[0]],
    r"Which of these words begin with the letter (\w)": _initial,
    r"Write this list with the (\w+) word in capitals": lambda words, which: [
        word.upper() if i == ORDINALS[which] else word for i, word in enumerate(words)
    ],
}


def follow(prompt: str) -> str:
    """The answer, from the text of the prompt alone."""
    instruction, listed = re.fullmatch(r"Question: (.+): ([a-z, ]+)[.?]\nAnswer:", prompt).groups()  # type: ignore[union-attr]
    words = listed.split(", ")
    assert len(set(words)) == len(words) in range(3, 7)
    [(match, act)] = [(match, act) for form, act in FOLLOWED.items() if (match := re.fullmatch(form, instruction))]
    return " " + ", ".join(act(words, match[1]))


def test_answers_follow_the_instructions() -> None:
    for item in ITEMS:
        assert follow(item.prompt) == item.answer, item


@pytest.mark.parametrize("instruction", ["Which of these words begin with the letter b", "Remove bird from this list"])
def test_a_second_answer_is_seen(instruction: str) -> None:
    with pytest.raises(AssertionError):
        follow(f"Question: {instruction}: bird, bread, bird.\nAnswer:")


def test_words_are_plain_and_every_instruction_is_drawn() -> None:
    assert all(re.fullmatch("[a-z]{3,}", word) for word in WORDS)
    assert len(set(WORDS)) == len(WORDS) > 100
    for text in INSTRUCTIONS.values():
        form = "Question: " + re.sub(r"\\\{\w+\\\}", ".+", re.escape(text))
        assert sum(bool(re.match(form, item.prompt)) for item in ITEMS) > 100, text
