"""Items of the embedded model's tasks: answers are right, choices are fair, words are in the vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

from starquant.testbed.items import ANSWER_LENGTH, Item, Split, rng_for
from starquant.testbed.tiny import arithmetic, programs, world
from starquant.testbed.tiny.recipes import tiny_config
from starquant.testbed.tiny.tokenizer import build_tokenizer, vocabulary

DRAWERS = (world.random_fact, world.random_profile, arithmetic.random_problem, programs.random_task)
CLAUSES = (
    (r"(?:buys|finds) (\d+)", lambda total, n: total + n),
    (r"gets (\d+) more", lambda total, n: total + n),
    (r"(?:loses|sells|gives away) (\d+)", lambda total, n: total - n),
    (r"ends up with (\d+) times as many", lambda total, n: total * n),
    (r"makes it (\d+) times", lambda total, n: total * n),
)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_domain", cache(programs._domain))  # computed anew for every draw otherwise
        yield


def _drawn(draw, count: int) -> list[Item]:
    rng = rng_for("test items", draw.__name__)
    splits = list(Split)
    return [draw(rng, splits[i % 3]) for i in range(count)]


def _solve(problem: str) -> list[int]:
    """Read a word problem anew and return its running totals."""
    begin, *clauses, question = re.split(r" \. (?:then )?", problem)
    assert question == "how many ?"
    person, total, thing = re.fullmatch(r"(\w+) has (\d+) (\w+)", begin).groups()  # type: ignore[union-attr]
    assert person in world.PEOPLE
    assert thing in arithmetic.THINGS
    totals = [int(total)]
    for clause in clauses:
        [(match, apply)] = [(m, f) for pattern, f in CLAUSES if (m := re.fullmatch(pattern, clause))]
        totals.append(apply(totals[-1], int(match[1])))
    return totals[1:]


def test_arithmetic_answers_are_the_running_totals() -> None:
    for item in _drawn(arithmetic.random_problem, 3_000):
        totals = _solve(item.prompt)
        assert item.answer == " , ".join(map(str, totals)), item
        assert len(totals) == 3
        assert all(0 <= total <= 59 for total in totals)


def test_arithmetic_uses_every_phrase_and_many_answers() -> None:
    found = _drawn(arithmetic.random_problem, 3_000)
    for phrases in arithmetic.PHRASES.values():
        for phrase in phrases:
            assert any(re.search(phrase.format(n=r"\d+"), item.prompt) for item in found), phrase
    last = Counter(item.answer.split()[-1] for item in found)
    assert len(last) > 50
    assert last.most_common(1)[0][1] < 0.06 * len(found)  # no number to guess


def _pairs(prompt: str) -> dict[int, int]:
    *shown, question = prompt.split(" ; ")
    assert question == "f x ="
    pairs = [re.fullmatch(r"f (\d+) = (\d+)", pair) for pair in shown]
    return {int(pair[1]): int(pair[2]) for pair in pairs if pair is not None}


def test_a_programs_answer_gives_shown_and_hidden_outputs() -> None:
    for item in _drawn(programs.random_task, 2_000):
        shown, hidden = _pairs(item.prompt), dict(item.hidden)
        assert len(shown) == 4
        assert hidden
        assert shown.keys().isdisjoint(hidden)
        for x, y in (shown | hidden).items():
            assert eval(item.answer, {"__builtins__": {}}, {"x": x}) == y
            assert 0 <= x <= 9
            assert 0 <= y <= 99


def test_the_shown_outputs_fit_one_program_only() -> None:
    table = {p: [eval(p, {"__builtins__": {}}, {"x": x}) for x in range(10)] for p in programs.PROGRAMS}
    assert len(table) > 100
    for item in _drawn(programs.random_task, 2_000):
        shown = _pairs(item.prompt)
        assert [p for p, values in table.items() if all(values[x] == y for x, y in shown.items())] == [item.answer]


def test_wrong_profiles_differ_in_one_value_each() -> None:
    for item in _drawn(world.random_profile, 2_000):
        assert len(item.choices) == 4
        assert item.choices.count(item.answer) == 1
        right = item.answer.split()
        changed = []
        for choice in item.choices:
            words = choice.split()
            assert len(words) == len(right)
            places = [i for i, pair in enumerate(zip(words, right, strict=True)) if pair[0] != pair[1]]
            changed += places
            assert len(places) == (choice != item.answer)
            assert all(words[i] in world.RELATIONS[words[i - 1]] for i in places)
        assert sorted(changed) == [1, 4, 7]


def test_a_profile_says_what_is_asked_and_true() -> None:
    for item in _drawn(world.random_profile, 500):
        person, *relations = re.fullmatch(r"describe (\w+) by (\w+) (\w+) (\w+) :", item.prompt).groups()  # type: ignore[union-attr]
        assert len(set(relations)) == 3
        said = [part.split() for part in item.answer.split(" , ")]
        assert said == [[relation, world.attribute(person, relation)] for relation in relations]


def test_the_right_profile_may_stand_anywhere() -> None:
    places = Counter(item.choices.index(item.answer) for item in _drawn(world.random_profile, 2_000))
    assert all(0.2 < places[i] / 2_000 < 0.3 for i in range(4))


def test_facts_offer_every_value_of_their_relation() -> None:
    for item in world.facts(Split.TEST):
        _, person, relation, _ = item.key.split("/")
        assert item.choices == world.RELATIONS[relation]
        assert item.choices.count(item.answer) == 1
        assert len(item.choices) == 16
        assert {person, relation} <= set(item.prompt.split())
        assert item.answer == world.attribute(person, relation)


def test_no_value_is_much_more_frequent_than_others() -> None:
    for relation, values in world.RELATIONS.items():
        counts = Counter(world.attribute(person, relation) for person in world.PEOPLE)
        assert set(counts) <= set(values)
        assert max(counts.values()) <= 12  # of 64 people, 16 values


def test_every_word_is_in_the_vocabulary(tiny_tokenizer) -> None:
    built = build_tokenizer()
    assert built.get_vocab() == tiny_tokenizer.get_vocab() == vocabulary()
    found = [item for draw in DRAWERS for item in _drawn(draw, 5_000)]
    texts = sorted({text for item in found for text in (item.prompt, item.answer, *item.choices)})
    for text, ids in zip(texts, built(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert built.unk_token_id not in ids, text
        assert len(ids) == len(text.split())
    assert built.batch_decode(built(texts, add_special_tokens=False)["input_ids"]) == texts


def test_every_item_fits_the_model() -> None:
    context_length = tiny_config().context_length
    for draw in DRAWERS:
        for item in _drawn(draw, 2_000):
            assert 1 <= len(item.answer.split()) <= ANSWER_LENGTH
            assert len(item.prompt.split()) + ANSWER_LENGTH <= context_length


def test_numbers_are_single_words() -> None:
    tokenizer = build_tokenizer()
    for number in range(100):
        [token] = tokenizer(str(number), add_special_tokens=False)["input_ids"]
        assert token != tokenizer.unk_token_id
    assert tokenizer("frog", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
