"""The Python subset: nothing gets out of it, takes long or grows large."""

from __future__ import annotations

import time

import pytest

from starquant.testbed.smol.tasks.python_operations import ProgramError
from starquant.testbed.smol.tasks.python_subset import MAX_SOURCE, run


def program(body: str) -> str:
    lines = body.replace("\\n", "\n").splitlines()
    return "def f(a):\n" + "".join(f"    {line}\n" for line in lines)


REFUSED = {
    "attribute": "return ().__class__.__base__.__subclasses__()",
    "attribute of a string": "return a.__class__",
    "format": "return '{0.__class__}'.format(a)",
    "formatting": "return '%1000000000d' % 1",
    "f-string": "return f'{a:>{10**9}}'",
    "import": "import os\\nreturn 1",
    "builtin import": "return __import__('os')",
    "exec": "exec('1')",
    "open": "return open('/etc/passwd')",
    "getattr": "return getattr(a, 'pop')",
    "lambda": "return (lambda: 1)()",
    "function within": "def g(b): return b\\nreturn g(1)",
    "class": "class A: pass\\nreturn 1",
    "global": "global b\\nreturn 1",
    "yield": "yield 1",
    "walrus": "return (b := 1)",
    "try": "try:\\n    return 1\\nexcept: pass",
    "with": "with a: pass",
    "delete": "del a",
    "float": "return 1.5",
    "division": "return 1 / 2",
    "negative power": "return 2 ** -1",
    "bytes": "return b'a'",
    "dictionary": "return {}",
    "builtin as a value": "return len",
    "iterator kept": "b = reversed([1])\\nreturn list(b)",
    "iterator returned": "return zip([1])",
    "identity": "return 'a' is 'a'",
    "method as a value": "return [1].pop",
    "break outside a loop": "break",
    "else of a loop": "for x in []: pass\\nelse: return 1",
    "key of one's own": "return sorted([1], key=f)",
    "unpacked arguments": "return max(*[1, 2])",
    "unpacked keywords": "return max([1], **{})",
    "huge power": "return 9 ** 9 ** 9",
    "huge power step by step": "x = 3\\nwhile True: x *= x",
    "long string": "return 'a' * 10 ** 9",
    "string that doubles": "b = 'a'\\nwhile True: b += b",
    "long replacement": "b = 'a' * 9000\\nreturn b.replace('a', b)",
    "long join": "b = 'a' * 9000\\nreturn b.join(b)",
    "long list": "return [0] * 10 ** 9",
    "list of lists": "b = [0] * 5000\\nreturn [b] * 5000",
    "list that holds itself": "b = []\\nb.append(b)\\nreturn b == b",
    "lists in lists": "b = [1]\\nwhile True: b = [b, b]",
    "deep list": "b = [1]\\nwhile True: b = [b]",
    "list that grows while read": "b = [1]\\nfor x in b: b.append(x)",
    "list extended by itself": "b = [1]\\nb.extend(zip(b))\\nreturn b",
    "list extended by a generator": "b = [1]\\nb.extend(x for x in b)\\nreturn b",
    "long range": "return sum(range(10 ** 12))",
    "longer range": "return len(range(10 ** 40))",
    "infinite loop": "while True: pass",
    "loop that says continue": "while 1: continue",
    "recursion": "return f(a)",
    "recursion in a generator": "return sum(f(x) for x in [1])",
    "exponential recursion": "return f(a) + f(a) if a else f(a)",
    "loops in loops": "return sum(1 for x in range(9999) for y in range(9999) for z in range(9999))",
    "generators in generators": "return any(all(any(0 for z in range(999)) for y in range(999)) for x in range(999))",
    "zip of much": "return [list(zip(range(9999), range(9999))) for x in range(9999)]",
    "huge digits": "return int('9' * 9999)",
    "rounding": "return round(5, -10 ** 9)",
    "wrong rounding": "return round('5')",
    "two arguments": "return f(1, 2)",
    "string of a list": "return str([1])",
    "shift": "return 1 << 10 ** 9",
    "matrix": "return a @ a",
    "slice assigned": "b = [1]\\nb[:] = [2]\\nreturn b",
    "attribute assigned": "a.b = 1",
    "attribute augmented": "a.b += 1",
    "slice augmented": "b = [1]\\nb[:] += [2]\\nreturn b",
    "sparse names": "return (((((b)))))",
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_is_outside_or_too_much_is_refused_quickly(body: str) -> None:
    start = time.process_time()
    with pytest.raises(ProgramError):
        run(program(body), "f", 1)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "source",
    [
        "",
        "return 1",
        "def f(a: return 1",
        "def g(a): return 1",
        "def f(): return 1",
        "def f(a, b): return 1",
        "def f(a, /): return 1",
        "def f(a=1): return 1",
        "def f(*a): return 1",
        "def f(*, a): return 1",
        "def f(a, **b): return 1",
        "def f(a: int): return 1",
        "def f(a) -> int: return 1",
        "@f\ndef f(a): return 1",
        "async def f(a): return 1",
        "def f(a): return 1\nf(1)",
        "def f(a): return 1\ndef f(a): return 1",
        "def f(a): return 'a\0'",
        "def f(a): return " + "-" * 3_000 + "1",
        "def f(a): return " + "(" * 1_500 + "1" + ")" * 1_500,
        "def f(a): return " + "1 + " * 900 + "1",
        "def f(a): return 1" + " " * MAX_SOURCE,
        "def f(a):\n" + "".join(" " * i + "if a:\n" for i in range(1, 60)) + " " * 60 + "import os",
    ],
)
def test_what_is_no_plain_function_is_refused(source: str) -> None:
    with pytest.raises(ProgramError):
        run(source, "f", 1)
