"""Passages about two to four people, and a question for two facts about one of them, who is described, not named."""

from __future__ import annotations

import random
from dataclasses import dataclass

from starquant.testbed.smol.tasks.words import NAMES


@dataclass(frozen=True)
class Attribute:
    """What can be said of a person.

    Attributes:
        values: no word is a value of two attributes, and none is a name.
        says: how a passage states it.
        noun: how a question asks for it.
        owner: how a question describes the person by it.
    """

    values: tuple[str, ...]
    says: str
    noun: str
    owner: str


def _attribute(values: str, says: str, noun: str, owner: str) -> Attribute:
    return Attribute(tuple(values.split()), says, noun, owner)


ATTRIBUTES = {
    "city": _attribute(
        "Paris London Berlin Madrid Rome Vienna Oslo Dublin Athens Lisbon Cairo Boston Chicago Denver Tokyo Delhi Lima "
        "Toronto Sydney Warsaw Prague Geneva Milan Munich Austin Dallas Havana Nairobi Seoul Budapest",
        "lives in {}",
        "city",
        "the person who lives in {}",
    ),
    "job": _attribute(
        "doctor teacher baker farmer lawyer pilot nurse painter writer singer plumber dentist chef judge sailor tailor "
        "driver engineer gardener librarian",
        "works as a {}",
        "job",
        "the {}",
    ),
    "pet": _attribute(
        "dog cat parrot rabbit hamster turtle horse goat snake duck goose pony",
        "has a {}",
        "pet",
        "the owner of the {}",
    ),
    "colour": _attribute(
        "red blue green yellow black white purple orange brown pink grey",
        "drives a {} car",
        "car colour",
        "the driver of the {} car",
    ),
    "tool": _attribute(
        "piano violin guitar flute drums trumpet harp cello",
        "plays the {}",
        "instrument",
        "the person who plays the {}",
    ),
    "food": _attribute(
        "pizza soup rice bread cheese salad pasta fish cake pie",
        "likes {} best",
        "favourite food",
        "the person who likes {} best",
    ),
}
SENTENCES = ("{p} {a}, {b} and {c}.", "{p} {a} and {b}. {p} also {c}.", "{p} {a}. {p} {b} and {c}.")


def draw(rng: random.Random) -> tuple[str, str]:
    """Return a prompt and its answer."""
    count = rng.randint(2, 4)
    people = rng.sample(NAMES, count)
    attributes = rng.sample(sorted(ATTRIBUTES), 3)
    values = {name: rng.sample(ATTRIBUTES[name].values, count) for name in attributes}
    passage = []
    for i, person in enumerate(people):
        clauses = [ATTRIBUTES[name].says.format(values[name][i]) for name in attributes]
        rng.shuffle(clauses)
        passage.append(rng.choice(SENTENCES).format(p=person, **dict(zip("abc", clauses, strict=True))))
    i = rng.randrange(count)
    known, first, second = rng.sample(attributes, 3)
    if known == "job" and "colour" in attributes and values["job"][i] == "driver":
        return draw(rng)  # whoever has a car drives it
    facts = [(ATTRIBUTES[name].noun, values[name][i]) for name in (first, second)]
    if rng.random() < 0.5:
        facts = [("name", people[i]), facts[0]]
    nouns, answers = zip(*facts, strict=True)
    owner = ATTRIBUTES[known].owner.format(values[known][i])
    question = f"What are the {nouns[0]} and the {nouns[1]} of {owner}?"
    return f"{' '.join(passage)}\nQuestion: {question}\nAnswer:", f" {', '.join(answers)}"
