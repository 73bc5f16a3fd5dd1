"""Word problems of one to three steps, like GSM8K's: the answer writes every step down, then the number.

What counts is what the story tells of: nobody owns more than that. Sentences that could be read in two ways after the
one before them are left out there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from starquant.testbed.smol.tasks.words import NAMES

THINGS = tuple(
    "apples books coins stamps marbles pencils cards shells cookies eggs oranges balloons stickers flowers tickets "
    "candles stones buttons toys bottles".split()
)
OPENINGS = (
    "{who} has {n} {thing}.",
    "There are {n} {thing} in {who}'s bag.",
    "{who} starts the day with {n} {thing}.",
    "{who} found {n} {thing} in the attic.",
)
BUYS = "Then {who} buys {n} more."
GIFT, GIVES = "{other} gives {who} {n} {thing}.", "{who} gives {n} to {other}."
LOSES, THROWS, SOLD = "{who} loses {n} of them.", "{who} throws {n} of them away.", "Then {n} of the {thing} are sold."
BOXES = "{who} puts them equally into {n} boxes and keeps one box."
SHARES = "{who} shares them equally among {n} people and takes one share."
PHRASES: dict[str, tuple[str, ...]] = {
    "+": (BUYS, GIFT, "Later {who} gets another {n}.", "{who} picks up {n} more on the way home."),
    "-": (LOSES, GIVES, SOLD, THROWS),
    "*": ("A week later {who} has {n} times as many.",),
    "/": (BOXES, SHARES),
}
HAVE, LEFT = "How many {thing} does {who} have now?", "How many {thing} are left with {who}?"
DIVISORS = (2, 3, 5)
#: Largest number that is multiplied.
LARGEST_FACTOR = 20

#: An operation, its sentence and its number.
Step = tuple[str, str, int]


def draw(rng: random.Random) -> tuple[str, str]:
    """Return a prompt and its answer."""
    who, other = rng.sample(NAMES, 2)
    words = {"thing": rng.choice(THINGS), "who": who, "other": other}
    total = rng.randint(2, 40)
    story = [rng.choice(OPENINGS).format(n=total, **words)]
    steps: list[Step] = []
    written = []
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        step = operation, phrase, n = _step(rng, total, steps)
        after = {"+": total + n, "-": total - n, "*": total * n, "/": total // n}[operation]
        story.append(phrase.format(n=n, **words))
        written.append(f"{total}{operation}{n}={after}.")
        steps.append(step)
        total = after
    story.append(_question(rng, steps).format(**words))
    return f"Question: {' '.join(story)}\nAnswer:", f" {' '.join(written)} The answer is {total}."


def phrases_after(steps: Sequence[Step]) -> dict[str, tuple[str, ...]]:
    """Return the sentences of each operation that have one reading after these steps.

    - "them" may be those just spoken of: that came, that were given away or sold, or boxes.
    - "as many" and a number without a noun need the total, or the things, to be what was last spoken of.
    - "of the things" may mean those that have left.
    """
    phrases = dict(PHRASES)
    if any(phrase in (GIVES, LOSES, THROWS, BOXES, SHARES) for _, phrase, _ in steps):
        phrases["-"] = (LOSES, GIVES, THROWS)
    if not steps:
        return phrases
    operation, phrase, _ = steps[-1]
    if operation in "+/" or phrase in (GIVES, SOLD):
        phrases["/"] = ()
    if operation == "/":
        phrases |= {"+": (GIFT,), "-": (LOSES, THROWS)}
    if operation == "/" or phrase in (GIFT, GIVES):
        phrases["*"] = ()
    return phrases


def _step(rng: random.Random, total: int, steps: Sequence[Step]) -> Step:
    phrases = phrases_after(steps)
    divisors = [n for n in DIVISORS if total % n == 0]
    possible = {"+": True, "-": total >= 3, "*": total <= LARGEST_FACTOR, "/": bool(divisors)}
    operation = rng.choice([one for one in PHRASES if possible[one] and phrases[one]])
    n = {
        "+": lambda: rng.randint(2, 40),
        "-": lambda: rng.randint(1, total - 1),
        "*": lambda: rng.randint(2, 5),
        "/": lambda: rng.choice(divisors),
    }[operation]()
    return operation, rng.choice(phrases[operation]), n


def _question(rng: random.Random, steps: Sequence[Step]) -> str:
    """Ask what is left where things only leave: what somebody is given is left with them, too."""
    only_leaving = all(operation in "-/" for operation, _, _ in steps)
    return rng.choice((HAVE, LEFT)) if only_leaving else HAVE
