"""The Python subset: what it accepts gives what CPython gives."""

from __future__ import annotations

import copy
import random
import re
import warnings
from typing import Any

import pytest

from starquant.testbed.items import Split, rng_for
from starquant.testbed.smol.tasks.items import stream
from starquant.testbed.smol.tasks.python_operations import ProgramError
from starquant.testbed.smol.tasks.python_subset import run, solves

LISTS: list[Any] = [[], [3], [1, -2, 30, 4], [5, 5, 0, -7, 2, 9]]
STRINGS: list[Any] = ["", "a", " Stone ", "Mississippi tram"]
INTEGERS: list[Any] = [0, 1, 7, -3, 31]
BODIES = r"""
return sum(x * x for x in a if x > 0)
return [x for x in a if x % 2 == 0][::-1]
return sorted(a, reverse=True)
return sorted(a, key=abs)
return max(a) if a else 0
return max(a, default=None)
return max([0, *a])
return min((abs(x) for x in a), default=-1)
return [i * x for i, x in enumerate(a)]
return [i for i, x in enumerate(a, 1) if x > 2]
return [x + y for x, y in zip(a, reversed(a))]
return list(zip(a, range(3)))
return [[x, y] for x in a for y in range(x) if y % 2 if x < 9]
return [[y for y in range(x)] for x in a]
return any(x > 3 for x in a)
return all(x > -9 for x in a) and not a == []
return a[0] if len(a) > 0 else 'none'
return a[1:-1] + a[:1] * 2
return 3 in a or 30 not in a
return 1 < len(a) <= 4 != 9
return a and a[-1]
return None or a
return (1, 2) + tuple(a)
return str(len(a)) + 'x' * 3
return ' '.join(str(x) for x in a)
return round(sum(a)) // 2 + 2 ** 5 - 7 % 3
return -7 // 2, -7 % 3, ~5, +True, 6 & 3 | 8 ^ 1
return bool(a) is True
return list(range(10, 0, -3))
return abs(-4) + int('12') + int(True)
total = 0\nfor x in a:\n    total += x\nreturn total
sum = 0\nfor x in a:\n    if x < 0:\n        continue\n    if x > 20:\n        break\n    sum += x\nreturn sum
b = []\nfor x in a:\n    if x > 2: b.append(x)\n    elif x == 0: b.insert(0, x)\n    else: pass\nreturn b
b = a\nb += [1]\nreturn a
b = a[:]\nb *= 2\nb.extend(a)\nreturn [a, b, b.count(3)]
i = 0\nwhile i < len(a) and a[i] != 30:\n    i += 1\nreturn i
b = list(a)\nb.sort(reverse=True)\nb.reverse()\nreturn b
x, y = 1, 2\nx, y = y, x\n[x, y] = [y, x]\nreturn x - y
for i in range(len(a)):\n    a[i] += i\n    a[-1] = 4\nreturn a
for x, y in [(1, 2), (3, 4)]:\n    a.append(x * y)\nreturn a
b = []\nfor x in a:\n    b = [x] + b\nreturn b
return [b for b in [1, 2] for a in [3]] + a
return [a for a in a]
return [x for x in a if x == max(a)]
return f(a[1:]) + a[0] if a else 0
while True:\n    if len(a) > 5: return a\n    a.append(len(a))
b = [a] * 2\nb[0].append(1)\nreturn b
a.remove(3)\nreturn a
return a.pop()
return a[7]
return 1 // len(a)
return undefined
return sum([[x] for x in a], [])
return x
len = 3\nreturn len
return a < [2] or a == list(a)
return list('ab' if a else 'cd')
pass
return
'a docstring'
""".strip().splitlines()
TEXT_BODIES = r"""
return a[::-1].upper()
return ''.join(reversed(a))
return ' '.join([w.capitalize() for w in a.split()])
return a.replace('s', 'TT').replace('', '-').lower()
return a.replace('s', 'x', 2).strip(' a')
return a.startswith('M') or a.endswith(' ') or a.count('s') > 2
return [c for c in a if c in 'aeiou']
return ''.join('x' if c == 'a' else c for c in a)
return a.find('t'), a.split('s'), a.split(maxsplit=1), a.isalpha()
return a.title().swapcase() * 2
out = ''\nfor c in a:\n    out = c + out\nreturn out
return sorted(a) + list(a)
return a[0] + a[-1] + a[1:3:2]
return max(a.split(), key=len)
return a > 'S' and 'b' * -1 == ''
return int(a)
return a % 3
return len(a) and a.index('s')
""".strip().splitlines()


def program(body: str) -> str:
    lines = body.replace("\\n", "\n").splitlines()
    return "def f(a):\n" + "".join(f"    {line}\n" for line in lines)


def cpython(source: str, argument: Any, name: str = "f") -> Any:
    """What CPython returns, or the error that it raises."""
    scope: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(source, scope)
        return scope[name](copy.deepcopy(argument))
    except Exception as error:
        return error


def agrees(source: str, argument: Any, name: str = "f") -> bool:
    """Whether the subset accepts a program; then it must give what CPython gives."""
    before = copy.deepcopy(argument)
    try:
        value = run(source, name, argument)
    except ProgramError:
        assert argument == before
        return False
    expected = cpython(source, argument, name)
    assert repr(value) == repr(expected), (source, argument)
    assert argument == before
    return True


@pytest.mark.parametrize(
    ("body", "arguments"),
    [*((body, LISTS) for body in BODIES), *((body, STRINGS) for body in TEXT_BODIES)],
)
def test_what_cpython_computes_is_computed_the_same(body: str, arguments: list[Any]) -> None:
    source = program(body)
    for argument in arguments:
        fails = isinstance(cpython(source, argument), Exception)
        assert agrees(source, argument) is not (fails or "*a]" in body)


def test_references_are_accepted() -> None:
    for item in stream("programs", "subset", 300, Split.TRAIN):
        for argument in item.args[:4]:
            assert agrees(item.prompt + item.answer, argument, str(item.entry_point))


#: Words that may stand in for one another.
ALIKE = [
    words.split()
    for words in (
        "+ - * // % ** & | ^",
        "< > == <= >= != in",
        "and or",
        "0 1 2 3 7 10 a x y b i [] [a] (a) '' ' ' None True a[0] a[1:] a[::-1] range(3) 1,",
        "sum len sorted max min list str any all reversed enumerate abs int bool tuple",
        "upper lower strip title split swapcase isalpha",
        "append remove index count extend",
        "break continue pass return",
        "= += -= *=",
    )
]


def _mutated(text: str, rng: random.Random) -> str:
    """The text with one or two of its words changed for others of their kind."""
    words = re.findall(r"\w+|\s+|//=?|\*\*|[-+*<>=!]=|.", text)
    places = [(i, alike) for i, word in enumerate(words) for alike in ALIKE if word in alike]
    for i, alike in rng.sample(places, min(len(places), rng.randint(1, 2))):
        words[i] = rng.choice(alike)
    return "".join(words)


def test_changed_programs_that_are_accepted_agree_with_cpython() -> None:
    rng, accepted = rng_for("mutated"), 0
    sources = [(program(body), LISTS) for body in BODIES] + [(program(body), STRINGS) for body in TEXT_BODIES]
    for _ in range(1_500):
        source, arguments = rng.choice(sources)
        accepted += agrees("def f(a):\n" + _mutated(source[10:], rng), rng.choice(arguments))
    assert accepted > 200


def test_values_must_be_of_the_same_type() -> None:
    for body, expected, right in (
        ("return 1", True, False),
        ("return True", True, True),
        ("return True", 1, False),
        ("return (1, 2)", [1, 2], False),
        ("return [1, 2]", [1, 2], True),
        ("return [1, True]", [1, 1], False),
        ("return [1]", [1, 1], False),
        ("return None", None, True),
    ):
        assert solves(program(body), "f", [[0, expected]]) is right
    assert not solves(program("return 1"), "f", [])
