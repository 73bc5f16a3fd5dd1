"""Programs: references pass, a docstring means one thing, and what else it might mean gives the same."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

import pytest

from starquant.testbed.items import Split
from starquant.testbed.smol.tasks import programs
from starquant.testbed.smol.tasks.items import row, stream
from starquant.testbed.smol.tasks.python_subset import solves
from starquant.testbed.smol.tasks.string_programs import STRING_OPERATIONS


@cache
def rows() -> list[dict]:
    return [row(item) for item in stream("programs", "test", 400, Split.TRAIN)]


def docstring(prompt: str) -> str:
    head, text = re.fullmatch(r'(def \w+\(\w+\):)\n    """(.+)"""\n', prompt).groups()  # type: ignore[union-attr]
    return f"{head.partition('(')[2]} {text}"


#: (what a docstring says, in the reference's code, what it may be read as). The code is written anew where it occurs.
READINGS = (
    (r"is between", r"(\d+) <= x <= (\d+)", r"\1 < x < \2"),
    (r"is between", r"(\d+) <= x <= (\d+)", r"\1 <= x < \2"),
    (r"largest|smallest", r", default=0\)", ")"),
    (r"largest|smallest", r"default=0", "default=None"),
    (r"(?:larg|small)est of the numbers doubled", r"(max|min)\(\[2 \* x (.+?)\], default=0\)", r"2 * \1([x \2])"),
    (r"est of the numbers (?:times|incr)", r"(max|min)\(\[x (. \d) (.+?)\], default=0\)", r"\1([x \3]) \2"),
    (r"sum of the numbers times", r"sum\(x \* (\d) (.+)\)", r"sum(x \2) * \1"),
    (r"spaces at the ends", r"\.strip\(\)", ".strip(' ')"),
    (r"replaced by", r"(.*)(.replace\('(.)', ('.')\))", lambda m: f"{m[1]}{m[2]}.replace('{m[3].upper()}', {m[4]})"),
    (r"then without its first", r"s(.+)\[1:\]", r"s[1:]\1"),
    (r"then without its last", r"s(.+)\[:-1\]", r"s[:-1]\1"),
    (r"Return s without its first character\.", r"s\[1:\]", "s.replace(s[0], '', 1)"),
)
#: What would leave open what is added, doubled or repeated.
NEVER = (
    r"plus|minus|sum of the numbers from",
    r"sum of the numbers increased",
    r"list of the numbers (doubled|times)",
    r"numbers doubled in xs",
    r"then repeated|reversed, then without its|ends, then without its|times, then without its",
    r"upper case, then with every",
)


def readings(docstring: str, answer: str) -> Iterator[str]:
    for says, code, other in READINGS:
        if re.search(says, docstring):
            changed = re.sub(code, other, answer.strip())
            assert changed != answer.strip(), (docstring, answer, code)
            yield f"    {changed}\n"


def test_references_pass() -> None:
    for one in rows():
        assert solves(one["prompt"] + one["answer"], one["entry_point"], one["cases"]), one
        assert 8 <= len(one["cases"]) <= 20 or "replaced by" in one["prompt"]
        assert len(one["cases"]) >= 4


def test_what_a_docstring_might_also_mean_passes_too() -> None:
    used = set()
    for one in rows():
        for text in readings(docstring(one["prompt"]), one["answer"]):
            assert solves(one["prompt"] + text, one["entry_point"], one["cases"]), (one, text)
        used |= {i for i, (says, *_) in enumerate(READINGS) if re.search(says, docstring(one["prompt"]))}
    assert used == set(range(len(READINGS)))


def test_no_docstring_leaves_open_what_is_meant() -> None:
    for item in stream("programs", "wording", 3_000, Split.TRAIN):
        assert not any(re.search(pattern, docstring(item.prompt)) for pattern in NEVER), item


def test_one_docstring_one_program() -> None:
    programs_of: dict[str, set[str]] = defaultdict(set)
    for item in stream("programs", "same", 5_000, Split.TRAIN):
        programs_of[docstring(item.prompt)].add(item.answer)
    assert len(programs_of) < 4_900  # many come several times, under other names
    assert {len(answers) for answers in programs_of.values()} == {1}


def test_the_first_character_is_taken_of_strings_that_have_one() -> None:
    for one in rows():
        if "without its first" in one["prompt"] and one["answer"].strip() == "return s[1:]":
            assert all(argument for argument, _ in one["cases"])


@pytest.mark.parametrize(
    "body", ["return {}", "return 0", "return True", "return False", "return ''", "return []", "pass"]
)
def test_nothing_passes_that_does_nothing(body: str) -> None:
    for one in rows():
        [parameter] = re.findall(r"\((\w+)\)", one["prompt"].partition("\n")[0])
        if "Return the list of the numbers in xs." not in one["prompt"]:
            text = f"    {body.format(parameter)}\n"
            assert not solves(one["prompt"] + text, one["entry_point"], one["cases"]), (one, body)


def test_conditions_and_numbers_matter() -> None:
    """Programs without the condition, or with the next number, fail nearly always."""
    passed = changed = 0
    for one in rows():
        answer = one["answer"]
        for text in (
            re.sub(r" if [^])]*", "", answer),
            re.sub(r"(if x [<>]|%) (\d)", lambda match: f"{match[1]} {int(match[2]) + 1}", answer),
        ):
            if text != answer:
                changed += 1
                passed += solves(one["prompt"] + text, one["entry_point"], one["cases"])
    assert changed > 200
    assert passed <= 0.02 * changed


def test_every_operation_is_drawn() -> None:
    texts = " ".join(one["prompt"] + one["answer"] for one in rows())
    for operation in STRING_OPERATIONS:
        assert re.search(re.sub(r"\{.\}", r"\\w+", operation.phrase), texts), operation
    for phrase in (*programs.MAPS, *programs.AGGREGATES, *(text for text, *_ in programs.FILTERS)):
        assert re.search(re.sub(r"\{.?\}", ".+", phrase), texts), phrase
    assert {one["entry_point"] for one in rows()} == set(programs.NAMES)
