"""Functions from their docstrings, like HumanEval's: of a list of integers, a string, or an integer.

A docstring is drawn only where it says what the function does in one way. Where readings differ on some arguments (does
"between" include its ends?) the function is not called with those.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from starquant.testbed.smol.tasks.string_programs import of_string

NAMES = "solve compute apply get_value process f transform calc work_out result".split()


@dataclass(frozen=True)
class Program:
    """A function to write.

    Attributes:
        prompt: its head and docstring.
        answer: its body.
        args: what it is called with, one a call.
    """

    prompt: str
    answer: str
    entry_point: str
    args: tuple[object, ...]


def draw(rng: random.Random) -> Program:
    """Return a function of a list (half of them), of a string or of a number."""
    name = rng.choice(NAMES)
    make, parameter = rng.choice(((_of_list, "xs"), (_of_list, "xs"), (of_string, "s"), (_of_number, "x")))
    docstring, code, args = make(rng)
    prompt = f'def {name}({parameter}):\n    """{docstring}"""\n'
    return Program(prompt, f"    return {code}\n", name, tuple(args))


#: What is done to each number, and the code.
MAPS = {
    "the numbers": "x",
    "the squares of the numbers": "x * x",
    "the numbers doubled": "2 * x",
    "the numbers increased by {k}": "x + {k}",
    "the absolute values of the numbers": "abs(x)",
    "the numbers times {k}": "x * {k}",
    "the negated numbers": "-x",
}
#: Which numbers are kept, the code, and the code as a function of x and m.
FILTERS: tuple[tuple[str, str, Callable[[int, int], bool]], ...] = (
    ("", "", lambda x, m: True),
    (" that are even", "x % 2 == 0", lambda x, m: x % 2 == 0),
    (" that are odd", "x % 2 == 1", lambda x, m: x % 2 == 1),
    (" that are positive", "x > 0", lambda x, m: x > 0),
    (" that are greater than {m}", "x > {m}", lambda x, m: x > m),
    (" that are less than {m}", "x < {m}", lambda x, m: x < m),
    (" that are divisible by {m}", "x % {m} == 0", lambda x, m: x % m == 0),
)
#: What becomes of them together, and the code.
AGGREGATES = {
    "the sum of {}": "sum({})",
    "the list of {}": "[{}]",
    "the largest of {}": "max([{}], default=0)",
    "the smallest of {}": "min([{}], default=0)",
    "the sorted list of {}": "sorted({})",
    "the count of {}": "len([{}])",
}
LISTS = 10  # that a function is called with


def _unclear(mapping: str, aggregate: str, filtered: bool) -> bool:
    """Whether "the sum of the numbers increased by 3" and the like leave open what is increased, doubled, repeated."""
    if mapping == "the numbers doubled" and not filtered:
        return True  # "the numbers doubled in xs" may be those that occur twice
    if "increased" in mapping:
        return "sum" in aggregate
    return "list" in aggregate and ("doubled" in mapping or "times" in mapping)


def _idle(mapping: str, aggregate: str, condition: str) -> bool:
    """Whether a condition changes nothing where something fulfils it, like the largest of the positive numbers."""
    if "squares" in mapping or "absolute" in mapping:
        return False
    upper = ("largest" in aggregate) is not ("negated" in mapping)
    keeps = ("positive", "greater") if upper else ("less",)
    return ("largest" in aggregate or "smallest" in aggregate) and any(word in condition for word in keeps)


def _probes(m: int) -> tuple[tuple[int, ...], ...]:
    """Return numbers that tell conditions apart."""
    return (m - 1, m, m + 1, 0, 1, -1, -20), (m, -20), (m + 1, -20), (m - 1, 1), (m, 1), (1, -20)


def _of_list(rng: random.Random) -> tuple[str, str, list[object]]:
    mapping, aggregate = rng.choice(list(MAPS)), rng.choice(list(AGGREGATES))
    condition, test, keeps = rng.choice(FILTERS)
    k, m = rng.randint(2, 9), rng.randint(2, 9)
    if "count" in aggregate:
        mapping = "the numbers"
    if _unclear(mapping, aggregate, bool(condition)) or _idle(mapping, aggregate, condition):
        return _of_list(rng)
    mapped, kept = mapping.format(k=k), condition.format(m=m)
    if mapping == "the numbers" or not condition:
        docstring = f"Return {aggregate.format(mapped + kept)} in xs."
    else:
        docstring = f"Keep the numbers in xs{kept}. Return {aggregate.format(mapped)}."
    clause = f" if {test.format(m=m)}" if test else ""
    code = AGGREGATES[aggregate].format(f"{MAPS[mapping].format(k=k)} for x in xs{clause}")
    extreme = "largest" in aggregate or "smallest" in aggregate  # the docstring does not say what of nothing
    lists = [rng.sample(probe, len(probe)) for probe in _probes(m)]
    args: list[object] = [xs for xs in lists if not extreme or any(keeps(x, m) for x in xs)]
    while len(args) < LISTS:
        xs = [rng.randint(-12, 30) for _ in range(rng.randint(0, 7))]
        if not extreme or any(keeps(x, m) for x in xs):
            args.append(xs)
    return docstring, code, args


INTEGERS = (0, 1, 2, 3, 5, 7, 9, 12, 18, 31, 40, -3, -10)


def _of_number(rng: random.Random) -> tuple[str, str, list[object]]:
    k, m, power = rng.randint(2, 9), rng.randint(1, 20), rng.choice((2, 3, 4))
    low = rng.randint(1, 9)
    high = low + rng.randint(2, 20)
    docstring, code, more = rng.choice(
        (
            (f"Return True if x is divisible by {k}.", f"x % {k} == 0", (k, 3 * k, -k, k * k + 1)),
            (f"Return the larger of x and {m}.", f"max(x, {m})", (m - 1, m + 1)),
            (f"Return the smaller of x and {m}.", f"min(x, {m})", (m - 1, m + 1)),
            (
                f"Return True if x is between {low} and {high}.",
                f"{low} <= x <= {high}",
                (low - 1, low + 1, high - 1, high + 1),
            ),
            (f"Return x to the power of {power}.", f"x ** {power}", ()),
        )
    )
    ends = (low, high) if "between" in docstring else ()  # which may be meant or not
    return docstring, code, [x for x in dict.fromkeys((*INTEGERS, *more)) if x not in ends]
