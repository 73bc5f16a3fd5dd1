"""Program synthesis by example: from four input-output pairs, write the expression that maps x to them."""

from __future__ import annotations

import random
from functools import cache

from starquant.testbed.items import Item, Split, split_of
from starquant.testbed.tiny.expressions import ExpressionError, evaluate

LARGEST = 99
INPUTS = range(10)
SHOWN = 4
WORDS = "f = ; x + - * ( )".split()


def _all_programs() -> tuple[str, ...]:
    programs = [f"{a} * x + {b}" for a in range(2, 8) for b in range(8)]
    programs += [f"{a} * x - {b}" for a in range(2, 8) for b in range(1, 8)]
    programs += [f"x * x + {b}" for b in range(8)]
    # (x + b) * a equals a * x + a * b, which the first family already writes when a * b <= 7.
    programs += [f"( x + {b} ) * {a}" for a in range(2, 8) for b in range(2, 8) if a * b > 7]
    return tuple(p for p in programs if len(_domain(p)) >= SHOWN + 1)


@cache
def _domain(program: str) -> tuple[int, ...]:
    return tuple(x for x in INPUTS if 0 <= evaluate(program, x) <= LARGEST)


PROGRAMS = _all_programs()


def random_task(rng: random.Random, split: Split) -> Item:
    """Draw a program and the pairs that show it; program and shown inputs belong to a split."""
    while True:
        program = rng.choice(PROGRAMS)
        domain = _domain(program)
        shown = rng.sample(domain, SHOWN)
        key = f"program/{program}/{sorted(shown)}"
        if split_of(key) is not split:
            continue
        pairs = " ; ".join(f"f {x} = {evaluate(program, x)}" for x in shown)
        hidden = tuple((x, evaluate(program, x)) for x in domain if x not in shown)
        return Item(f"{pairs} ; f x =", program, key, hidden=hidden)


def solves(program: str, pairs: list[tuple[int, int]]) -> bool:
    """Whether a program of the language gives every output; text that is no program solves nothing."""
    try:
        return bool(pairs) and all(evaluate(program, x) == y for x, y in pairs)
    except ExpressionError:
        return False
