"""Functions of a string: one operation, or two one after the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StringOperation:
    """One step of a function of a string.

    Attributes:
        moves: whether characters change places, so that "its first character" may be the string's or the result's.
    """

    phrase: str
    code: str
    apply: Callable[[str, int, str, str], str]
    moves: bool = False


REVERSED = StringOperation("reversed", "{e}[::-1]", lambda s, k, c, d: s[::-1], moves=True)
UPPER = StringOperation("in upper case", "{e}.upper()", lambda s, k, c, d: s.upper())
LOWER = StringOperation("in lower case", "{e}.lower()", lambda s, k, c, d: s.lower())
NO_FIRST = StringOperation("without its first character", "{e}[1:]", lambda s, k, c, d: s[1:])
NO_LAST = StringOperation("without its last character", "{e}[:-1]", lambda s, k, c, d: s[:-1])
REPEATED = StringOperation("repeated {n} times", "{e} * {k}", lambda s, k, c, d: s * k, moves=True)
REPLACED = StringOperation(
    "with every {c} replaced by {d}", "{e}.replace('{c}', '{d}')", lambda s, k, c, d: s.replace(c, d)
)
STRIPPED = StringOperation("without spaces at the ends", "{e}.strip()", lambda s, k, c, d: s.strip(), moves=True)
STRING_OPERATIONS = (REVERSED, UPPER, LOWER, NO_FIRST, NO_LAST, REPEATED, REPLACED, STRIPPED)
DIGITS = "zero one two three four five".split()
LETTERS = "abcdeimnort"  # no s: the parameter is called so
STRINGS = (
    *("", "a", " Stone ", "banana", "Mississippi tram", "Erde und Mond", "x y z"),
    *("abcde", " mice on a train", "Random bits ", "soda cans"),
)


def follows(first: StringOperation, second: StringOperation) -> bool:
    """Whether "first, then second" has one reading.

    "Repeated" may repeat the operation; a letter to replace may be meant in capitals after "in upper case"; "its" may
    be the string's or the result's.
    """
    if second is REPEATED or (first, second) == (UPPER, REPLACED):
        return False
    return not (first.moves and second in (NO_FIRST, NO_LAST))


def of_string(rng: random.Random) -> tuple[str, str, list[object]]:
    """Return a docstring, the expression that it describes, and the strings that leave no doubt about the result."""
    operations = rng.sample(STRING_OPERATIONS, rng.choice((1, 2, 2)))
    if len(operations) == 2 and not follows(*operations):
        return of_string(rng)
    code, phrases = "s", []
    strings = {s: s for s in STRINGS}  # to what became of it so far
    for operation in operations:
        k, (c, d) = rng.randint(2, 5), rng.sample(LETTERS, 2)
        phrases.append(operation.phrase.format(n=DIGITS[k], c=c, d=d))
        code = operation.code.format(e=f"({code})" if " * " in code else code, k=k, c=c, d=d)
        if operation in (NO_FIRST, NO_LAST):
            strings = {s: now for s, now in strings.items() if now}
        if operation is REPLACED:
            strings = {s: now for s, now in strings.items() if c.upper() not in now}
        strings = {s: operation.apply(now, k, c, d) for s, now in strings.items()}
    return f"Return s {', then '.join(phrases)}.", code, list(strings)
