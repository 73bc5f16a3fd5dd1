"""Passages: read anew, one person fits the question's description, and no word has two meanings."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

from starquant.testbed.items import Split
from starquant.testbed.smol.tasks.items import stream
from starquant.testbed.smol.tasks.reading import ATTRIBUTES
from starquant.testbed.smol.tasks.words import NAMES

ITEMS = stream("reading", "test", 1_000, Split.TRAIN)
CLAUSES = {name: re.compile(re.escape(one.says).replace(r"\{\}", r"(\w+)")) for name, one in ATTRIBUTES.items()}


def facts(passage: str) -> dict[str, dict[str, str]]:
    """What is said of each person."""
    said: dict[str, dict[str, str]] = {}
    for sentence in re.findall(r"([^.]+)\. ?", passage):
        person, clauses = re.fullmatch(r"(\w+)(?: also)? (.+)", sentence).groups()  # type: ignore[union-attr]
        for clause in re.split(", | and ", clauses):
            [(name, value)] = [(name, match[1]) for name, form in CLAUSES.items() if (match := form.fullmatch(clause))]
            assert name not in said.setdefault(person, {})
            said[person][name] = value
    return said


def answers(prompt: str) -> set[str]:
    """What an answer may be: one for each person whom the description fits."""
    passage, question = re.fullmatch(r"(.+)\nQuestion: (.+)\nAnswer:", prompt).groups()  # type: ignore[union-attr]
    said = facts(passage)
    nouns = {one.noun: name for name, one in ATTRIBUTES.items()}
    first, second, owner = re.fullmatch(r"What are the ([a-z ]+) and the ([a-z ]+?) of (.+)\?", question).groups()  # type: ignore[union-attr]
    fitting = {
        person
        for person, values in said.items()
        for name, value in values.items()
        if ATTRIBUTES[name].owner.format(value) == owner or (name == "colour" and owner == "the driver")
    }
    return {
        ", ".join(person if noun == "name" else said[person][nouns[noun]] for noun in (first, second))
        for person in fitting
    }


def test_a_question_has_one_answer_and_it_is_the_one_given() -> None:
    for item in ITEMS:
        assert answers(item.prompt) == {item.answer.removeprefix(" ")}, item
        assert item.answer.startswith(" ")


def test_a_second_person_who_fits_is_seen() -> None:
    passage = (
        "Anna works as a driver, drives a red car and has a dog. Ben works as a chef, drives a blue car and has a cat."
    )
    assert len(answers(f"{passage}\nQuestion: What are the name and the pet of the driver?\nAnswer:")) == 2


def test_people_differ_in_everything() -> None:
    for item in ITEMS:
        said = facts(item.prompt.partition("\n")[0])
        assert 2 <= len(said) <= 4
        assert {len(values) for values in said.values()} == {3}
        for one, other in combinations(said.values(), 2):
            assert one.keys() == other.keys()
            assert not set(one.values()) & set(other.values())


def test_no_word_means_two_things() -> None:
    words = Counter(word.lower() for one in ATTRIBUTES.values() for word in one.values)
    words.update(name.lower() for name in NAMES)
    assert words.most_common(1)[0][1] == 1


def test_everything_is_asked_for() -> None:
    questions = [item.prompt.partition("Question: ")[2] for item in ITEMS]
    for one in ATTRIBUTES.values():
        assert sum(f"the {one.noun} " in question for question in questions) > 100
    assert 0.4 < sum("What are the name and" in question for question in questions) / len(ITEMS) < 0.6
