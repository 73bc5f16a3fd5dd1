"""A synthetic world of people and their attributes: knowledge that is tested by likelihood.

`facts` asks for one attribute (one-token answers); `profiles` asks for three in a given order (eight-token
answers, long enough that the likelihood is a Monte-Carlo estimate).
"""

from __future__ import annotations

import random

from starquant.testbed.items import Item, Split, rng_for, split_of

PEOPLE = tuple(
    "ada ben cara dan eva finn gina hugo iris jack kara leo mira nils olga paul quinn rosa sam tina "
    "ugo vera walt xena yara zeno amir bela cleo dora emil faye gus hana ivan jana kurt lena milo nora "
    "otto pia ravi sara theo ulla vito wendy yuri zoe arno bea carl dina egon fritz greta hedy ines jon "
    "kai lars mona nick".split()
)
RELATIONS: dict[str, tuple[str, ...]] = {
    "city": tuple(
        "oslo paris rome cairo lima tokyo delhi quito berlin dublin athens seoul madrid boston dakar hanoi".split()
    ),
    "job": tuple(
        "baker pilot nurse farmer judge painter tailor plumber singer sailor miner teacher writer dancer "
        "butcher guard".split()
    ),
    "pet": tuple("cat dog horse parrot rabbit turtle lizard goat snake hamster fish duck ferret pony hen fox".split()),
    "food": tuple(
        "rice bread soup pasta salad curry pizza beans cheese tofu stew noodles eggs corn cake fries".split()
    ),
    "drink": tuple("tea coffee milk juice water cocoa cider lemonade beer wine soda broth rum gin mead punch".split()),
    "color": tuple(
        "red blue green yellow black white purple orange pink brown grey gold silver teal beige violet".split()
    ),
    "sport": tuple(
        "tennis chess rugby golf judo polo rowing boxing hockey soccer squash skiing karate diving archery "
        "surfing".split()
    ),
    "tool": tuple(
        "hammer saw drill wrench chisel pliers file axe shovel rake needle brush knife ladder rope level".split()
    ),
}
FACT_TEMPLATES = (
    "what is the {relation} of {person} ?",
    "the {relation} of {person} is",
    "{person} has which {relation} ?",
    "tell me the {relation} of {person} :",
    "which {relation} belongs to {person} ?",
    "{person} : {relation} =",
)
WORDS = "what is the of ? has which tell me : belongs to = describe by , .".split()


def attribute(person: str, relation: str) -> str:
    """Return the one value of a person's attribute."""
    return rng_for("world", person, relation).choice(RELATIONS[relation])


def fact_template_split(person: str, relation: str, template: int) -> Split:
    """Every fact is trained in four wordings, validated in a fifth and tested in a sixth."""
    order = rng_for("wording", person, relation).sample(range(len(FACT_TEMPLATES)), len(FACT_TEMPLATES))
    return {0: Split.TEST, 1: Split.VALIDATION}.get(order.index(template), Split.TRAIN)


def fact(person: str, relation: str, template: int) -> Item:
    """Ask for one attribute in one wording; all sixteen values of the relation are the choices."""
    prompt = FACT_TEMPLATES[template].format(relation=relation, person=person)
    return Item(prompt, attribute(person, relation), f"fact/{person}/{relation}/{template}", RELATIONS[relation])


def facts(split: Split) -> list[Item]:
    """Return every fact question of a split, in a fixed order."""
    return [
        fact(person, relation, template)
        for person in PEOPLE
        for relation in RELATIONS
        for template in range(len(FACT_TEMPLATES))
        if fact_template_split(person, relation, template) is split
    ]


def profile(person: str, relations: tuple[str, str, str]) -> Item:
    """Ask for three attributes in order; each wrong choice has one of the three values exchanged."""
    key = f"profile/{person}/{'/'.join(relations)}"
    attributes = [attribute(person, relation) for relation in relations]
    rng = rng_for("choices", key)
    choices = [_profile_answer(relations, attributes)]
    for changed in range(3):
        others = [value for value in RELATIONS[relations[changed]] if value != attributes[changed]]
        wrong = [*attributes]
        wrong[changed] = rng.choice(others)
        choices.append(_profile_answer(relations, wrong))
    answer = choices[0]
    rng.shuffle(choices)
    return Item(f"describe {person} by {' '.join(relations)} :", answer, key, tuple(choices))


def _profile_answer(relations: tuple[str, ...], attributes: list[str]) -> str:
    return " , ".join(f"{relation} {value}" for relation, value in zip(relations, attributes, strict=True))


def random_fact(rng: random.Random, split: Split) -> Item:
    """Draw a fact question of a split."""
    while True:
        person, relation = rng.choice(PEOPLE), rng.choice(list(RELATIONS))
        template = rng.randrange(len(FACT_TEMPLATES))
        if fact_template_split(person, relation, template) is split:
            return fact(person, relation, template)


def random_profile(rng: random.Random, split: Split) -> Item:
    """Draw a profile question of a split."""
    while True:
        person = rng.choice(PEOPLE)
        first, second, third = rng.sample(list(RELATIONS), 3)
        if split_of(f"profile/{person}/{first}/{second}/{third}") is split:
            return profile(person, (first, second, third))
