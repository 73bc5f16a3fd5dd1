"""Three-step arithmetic word problems, answered by the running totals: generation that errors can derail."""

from __future__ import annotations

import random

from starquant.testbed.items import Item, Split, split_of
from starquant.testbed.tiny.world import PEOPLE

LARGEST = 59
THINGS = tuple("apples pears coins books stamps shells marbles cards".split())
PHRASES: dict[str, tuple[str, ...]] = {
    "+": ("buys {n}", "finds {n}", "gets {n} more"),
    "-": ("loses {n}", "sells {n}", "gives away {n}"),
    "*": ("ends up with {n} times as many", "makes it {n} times"),
}
WORDS = "buys finds gets more loses sells gives away ends up with times as many makes it then has . how ? ,".split()


def _apply(op: str, total: int, n: int) -> int:
    return {"+": total + n, "-": total - n, "*": total * n}[op]


def _step(rng: random.Random, total: int) -> tuple[str, int]:
    while True:
        op = rng.choices("+-*", weights=(4, 4, 2))[0]
        n = rng.randint(2, 3) if op == "*" else rng.randint(1, 9)
        if 0 <= _apply(op, total, n) <= LARGEST and not (op == "*" and total == 0):
            return op, n


def random_problem(rng: random.Random, split: Split) -> Item:
    """Draw a problem whose numbers and operations (not its wording) belong to a split."""
    while True:
        total = start = rng.randint(1, 20)
        steps, totals = [], []
        for _ in range(3):
            op, n = _step(rng, total)
            total = _apply(op, total, n)
            steps.append((op, n))
            totals.append(total)
        key = f"arithmetic/{start}" + "".join(f"{op}{n}" for op, n in steps)
        if split_of(key) is not split:
            continue
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        sentences = " . then ".join(rng.choice(PHRASES[op]).format(n=n) for op, n in steps)
        return Item(f"{person} has {start} {thing} . {sentences} . how many ?", " , ".join(map(str, totals)), key)
