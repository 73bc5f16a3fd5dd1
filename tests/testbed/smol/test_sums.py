"""Word problems: solved anew from their text alone, in every way that their sentences can be read."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from starquant.testbed.items import Split
from starquant.testbed.smol.tasks import sums
from starquant.testbed.smol.tasks.items import stream
from starquant.testbed.smol.tasks.scoring import final_number
from starquant.testbed.smol.tasks.words import NAMES

ITEMS = stream("sums", "test", 800, Split.TRAIN)
SENTENCES = {
    "buys": r"Then {who} buys (\d+) more|Later {who} gets another (\d+)|{who} picks up (\d+) more on the way home",
    "gift": r"{other} gives {who} (\d+) {thing}",
    "loses": r"{who} loses (\d+) of them|{who} throws (\d+) of them away",
    "gives": r"{who} gives (\d+) to {other}",
    "sold": r"Then (\d+) of the {thing} are sold",
    "times": r"A week later {who} has (\d+) times as many",
    "boxes": r"{who} puts them equally into (\d+) boxes and keeps one box",
    "shares": r"{who} shares them equally among (\d+) people and takes one share",
}
OPENING = re.compile(
    r"(?:(?P<a>\w+) has (\d+) (\w+)|There are (\d+) (\w+) in (?P<b>\w+)'s bag|"
    r"(?P<c>\w+) starts the day with (\d+) (\w+)|(?P<d>\w+) found (\d+) (\w+) in the attic)"
)


@cache
def parse(prompt: str) -> tuple[int, list[tuple[str, int]], str]:
    """The first number, (kind of sentence, number) of each step, and the question."""
    [story] = re.findall(r"^Question: (.*)\nAnswer:$", prompt)
    opening, *sentences, question = re.split(r"(?<=[.?]) ", story)
    match = OPENING.fullmatch(opening.removesuffix("."))
    assert match, opening
    [who] = [name for name in match.groupdict().values() if name]
    [n] = [int(group) for group in match.groups() if group and group.isdigit()]
    [thing] = [group for group in match.groups() if group in sums.THINGS]
    words = {"who": who, "thing": thing, "other": "|".join(f"(?:{name})" for name in NAMES if name != who)}
    words["other"] = f"(?:{words['other']})"
    steps = []
    for sentence in sentences:
        matches = {
            kind: match
            for kind, pattern in SENTENCES.items()
            if (match := re.fullmatch(pattern.format(**words), sentence.removesuffix(".")))
        }
        [(kind, match)] = matches.items()
        steps.append((kind, int(next(group for group in match.groups() if group))))
    return n, steps, question


def readings(prompt: str) -> set[int]:
    """Every number that an answer may be, "them", "as many", "of the things" read in each way that makes sense."""
    n, steps, question = parse(prompt)
    totals, before, gone, gifts = {n}, ("", 0), 0, []
    for kind, m in steps:
        last, number = before
        if kind in ("buys", "gift"):
            boxes = {total for total in totals if last in ("boxes", "shares") and kind == "buys"}  # m more boxes
            totals = {total + m for total in totals} | boxes
        elif kind in ("loses", "gives"):
            totals = {total - m for total in totals} | {t for t in totals if kind == "gives" and last == "boxes"}
            gone += m
        elif kind == "sold":
            totals = {total - m for total in totals} | {total for total in totals if gone >= m}
        elif kind == "times":
            as_many = {number * m for _ in totals if last in ("gift", "gives", "boxes", "shares")}
            totals = {total * m for total in totals} | as_many
        else:
            them = {number for _ in totals if last in ("buys", "gift", "gives", "sold", "boxes", "shares")}
            assert all(total % m == 0 for total in totals)
            totals = {total // m for total in totals} | {m * 1_000 + part for part in them if part % m == 0}
            gone += 10**6
        gifts += [m for _ in totals if kind in ("gift", "buys")]
        before = (kind, m)
        assert all(total > 0 for total in totals)
    return totals | set(gifts if question.startswith("How many") and " left with " in question else [])


def test_a_problem_has_one_answer_and_it_is_the_one_given() -> None:
    for item in ITEMS:
        assert {str(total) for total in readings(item.prompt)} == {final_number(item.answer)}, item


@pytest.mark.parametrize(
    "story",
    [
        "Then Anna buys 4 more. Anna puts them equally into 2 boxes and keeps one box. {have}",
        "Anna gives 4 to Ben. Then 3 of the coins are sold. {have}",
        "Ben gives Anna 5 coins. A week later Anna has 3 times as many. {have}",
        "Ben gives Anna 5 coins. How many coins are left with Anna?",
        "Anna puts them equally into 2 boxes and keeps one box. Then Anna buys 2 more. {have}",
    ],
)
def test_a_second_reading_is_seen(story: str) -> None:
    story = story.format(have="How many coins does Anna have now?")
    assert len(readings(f"Question: Anna has 10 coins. {story}\nAnswer:")) > 1


def test_steps_are_written_down_and_lead_to_the_answer() -> None:
    for item in ITEMS:
        n, steps, _ = parse(item.prompt)
        match = re.fullmatch(r"( \d+[-+*/]\d+=\d+\.)+ The answer is \d+\.", item.answer)
        assert match, item
        written = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)\.", item.answer)
        assert [int(number) for _, _, number, _ in written] == [number for _, number in steps]
        for before, operation, number, after in written:
            assert int(before) == n
            n = eval(f"{before}{operation.replace('/', '//')}{number}")
            assert int(after) == n > 0


def test_every_sentence_is_used() -> None:
    kinds = Counter(kind for item in ITEMS for kind, _ in parse(item.prompt)[1])
    assert set(kinds) == set(SENTENCES)
    assert min(kinds.values()) > 25
    assert 80 < sum(" left with " in item.prompt for item in ITEMS) < 400
    answers = Counter(final_number(item.answer) for item in ITEMS)
    assert answers.most_common(1)[0][1] < 0.06 * len(ITEMS)  # no number to guess
