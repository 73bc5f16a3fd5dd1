"""Training and held-out items share nothing, and are the same on every machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

from starquant.evaluation.testbed_tasks import items
from starquant.testbed.items import Item, Split, rng_for, split_of
from starquant.testbed.tiny import arithmetic, programs, train, world

DRAWERS = {
    "facts": world.random_fact,
    "profiles": world.random_profile,
    "arithmetic": arithmetic.random_problem,
    "programs": programs.random_task,
}
TASKS = tuple(DRAWERS)
HELD_OUT = (Split.VALIDATION, Split.TEST)
held_out = cache(items)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_domain", cache(programs._domain))  # computed anew for every draw otherwise
        yield


def _text(item: Item) -> str:
    """The prompt without the order of a program's examples, which changes nothing of what is asked."""
    return " ; ".join(sorted(item.prompt.split(" ; ")))


@pytest.mark.parametrize("task", TASKS)
def test_training_items_are_not_held_out(task: str) -> None:
    kept = [item for split in HELD_OUT for item in held_out(task, split)]
    keys, texts = {item.key for item in kept}, {_text(item) for item in kept}
    rng = rng_for("test", task)
    drawn = [DRAWERS[task](rng, Split.TRAIN) for _ in range(20_000)]
    assert keys.isdisjoint(item.key for item in drawn)
    assert texts.isdisjoint(_text(item) for item in drawn)
    assert len({item.key for item in drawn}) > 2_000


def test_what_training_draws_is_not_held_out() -> None:
    kept = [item for task in TASKS for split in HELD_OUT for item in held_out(task, split)]
    texts = {_text(item) for item in kept}
    drawn = [item for step in range(40) for item in train._draw(train.SHORT + train.LONG, rng_for("train", 0, step))]
    assert {item.key.split("/")[0] for item in drawn} == {"fact", "profile", "arithmetic", "program"}
    assert texts.isdisjoint(_text(item) for item in drawn)


@pytest.mark.parametrize("task", TASKS)
def test_validation_and_test_items_are_distinct_and_enough(task: str) -> None:
    validation, test = (held_out(task, split) for split in HELD_OUT)
    for found in (validation, test):
        assert len(found) >= 500
        assert len({item.key for item in found}) == len(found)
    assert {item.key for item in validation}.isdisjoint(item.key for item in test)
    assert {_text(item) for item in validation}.isdisjoint(_text(item) for item in test)


@pytest.mark.parametrize("task", TASKS)
def test_items_of_a_split_belong_to_it(task: str) -> None:
    for split in Split:
        rng = rng_for("belongs", task, split.value)
        for item in [DRAWERS[task](rng, split) for _ in range(200)]:
            if task == "facts":
                _, person, relation, template = item.key.split("/")
                assert world.fact_template_split(person, relation, int(template)) is split
            else:
                assert split_of(item.key) is split


def test_every_fact_is_trained_in_four_wordings_and_tested_in_another() -> None:
    facts = [(person, relation) for person in world.PEOPLE for relation in world.RELATIONS]
    wordings = {}
    for split, count in ((Split.TRAIN, 4), (Split.VALIDATION, 1), (Split.TEST, 1)):
        found = held_out("facts", split)
        asked = Counter(tuple(item.key.split("/")[1:3]) for item in found)
        assert asked == dict.fromkeys(facts, count)
        wordings[split] = {item.prompt for item in found}
    assert sum(map(len, wordings.values())) == len(set.union(*wordings.values())) == 6 * len(facts)


def test_no_wording_is_held_out_everywhere() -> None:
    for split in Split:
        templates = Counter(item.key.split("/")[3] for item in held_out("facts", split))
        share = [count / templates.total() for count in templates.values()]
        assert len(share) == 6
        assert all(0.1 < part < 0.24 for part in share)


def test_the_same_fact_has_the_same_answer_in_every_wording() -> None:
    answers: dict[str, set[str]] = {}
    for split in Split:
        for item in held_out("facts", split):
            answers.setdefault(item.key.rpartition("/")[0], set()).add(item.answer)
    assert all(len(found) == 1 for found in answers.values())


def test_a_tenth_goes_to_either_held_out_split() -> None:
    counts = Counter(split_of(f"some/key/{i}") for i in range(20_000))
    for split in HELD_OUT:
        assert 0.09 < counts[split] / 20_000 < 0.11


#: Without what lm-eval reads the items with, which takes longer to import than they take to draw.
_DIGEST = """
import hashlib, sys, types
for name in ("datasets", "starquant.evaluation.command_line"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["datasets"].Dataset = None
from starquant.evaluation.testbed_tasks import items
from starquant.testbed.items import Split
for task in ("facts", "profiles", "arithmetic", "programs"):
    for split in (Split.VALIDATION, Split.TEST):
        print(task, split.value, hashlib.sha256(repr(items(task, split)).encode()).hexdigest())
"""


def test_items_are_the_same_in_another_process() -> None:
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": seed}
    out = subprocess.run([sys.executable, "-c", _DIGEST], env=environment, capture_output=True, text=True, check=True)
    here = [
        f"{task} {split.value} {hashlib.sha256(repr(held_out(task, split)).encode()).hexdigest()}"
        for task in TASKS
        for split in HELD_OUT
    ]
    assert out.stdout.splitlines()[-len(here) :] == here
