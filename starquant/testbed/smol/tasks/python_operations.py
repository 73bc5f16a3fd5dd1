"""Operators, builtins and methods of the Python subset: CPython's own, after a look at how much they would make.

Values are ints, bools, strings, None, lists, tuples and ranges. Iterators (of zip, generator expressions) go straight
to what reads them.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable
from typing import Any

#: Evaluations, and elements of the values they give, of a call.
MAX_STEPS = 100_000
#: Elements of a value, those of its elements included; characters are elements.
MAX_SIZE = 10_000
MAX_BITS = 4_096


class ProgramError(ValueError):
    """The text is no program of the subset, fails, or exceeds a limit."""


class Budget:
    """The steps that a call has left."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS

    def spend(self, steps: int = 1) -> None:
        """Take steps off."""
        self.steps -= steps
        if self.steps < 0:
            raise ProgramError(f"takes more than {MAX_STEPS} steps")

    def pay(self, value: Any) -> Any:
        """Return a value after taking its size off."""
        size, pending = 0, [value]
        while pending:
            part = pending.pop()
            if isinstance(part, int):
                if part.bit_length() > MAX_BITS:
                    raise ProgramError(f"an integer has more than {MAX_BITS} bits")
            elif isinstance(part, str | list | tuple | range):
                size += len(part)
                require_size(size)
                if isinstance(part, list | tuple):
                    pending.extend(part)
        self.spend(size)
        return value


def require_size(size: int) -> None:
    """Refuse a value of more elements than are allowed."""
    if size > MAX_SIZE:
        raise ProgramError(f"a value has more than {MAX_SIZE} elements")


_INTEGER_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type[ast.unaryop], Callable[[int], int]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
OPERATORS: tuple[type[ast.AST], ...] = (
    *(*_INTEGER_OPERATORS, *_UNARY, *_COMPARISONS),
    *(ast.Not, ast.And, ast.Or, ast.Is, ast.IsNot),
)


def binary(kind: ast.operator, left: Any, right: Any, in_place: bool = False) -> Any:
    """Return `left kind right`; in place, a list is changed."""
    if isinstance(left, int) and isinstance(right, int):
        if isinstance(kind, ast.Pow) and (right < 0 or left.bit_length() * right > MAX_BITS):
            raise ProgramError(f"a power is no integer of {MAX_BITS} bits")
        return _INTEGER_OPERATORS[type(kind)](left, right)
    if isinstance(kind, ast.Add) and type(left) is type(right) and isinstance(left, str | list | tuple):
        return operator.iadd(left, right) if in_place else left + right
    if isinstance(kind, ast.Mult):
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                require_size(len(sequence) * max(count, 0))
                return operator.imul(left, right) if in_place and sequence is left else left * right
    types = f"{type(left).__name__} and {type(right).__name__}"
    raise ProgramError(f"{type(kind).__name__} of {types} is not in the subset")


def unary(kind: ast.unaryop, value: Any) -> Any:
    """Return `kind value`."""
    if isinstance(kind, ast.Not):
        return not value
    if not isinstance(value, int):
        raise ProgramError(f"{type(kind).__name__} of {type(value).__name__} is not in the subset")
    return _UNARY[type(kind)](value)


def compare(kind: ast.cmpop, left: Any, right: Any) -> Any:
    """Return `left kind right`; `is` is for None, True and False only, other identities are CPython's business."""
    if isinstance(kind, ast.Is | ast.IsNot):
        if right is not None and not isinstance(right, bool):
            raise ProgramError("'is' compares with None, True or False only")
        return (left is right) is isinstance(kind, ast.Is)
    return _COMPARISONS[type(kind)](left, right)


def _integer(value: Any = 0) -> int:
    if not isinstance(value, int | str):
        raise ProgramError(f"int of {type(value).__name__} is not in the subset")
    return int(value)


def _string(value: Any = "") -> str:
    if value is not None and not isinstance(value, int | str):
        raise ProgramError(f"str of {type(value).__name__} is not in the subset")
    return str(value)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    require_size(len(numbers))
    return numbers


def _round(value: Any) -> int:
    if not isinstance(value, int):
        raise ProgramError(f"round of {type(value).__name__} is not in the subset")
    return round(value)


#: Builtins, and the keywords that they are called with.
BUILTINS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "sum": (sum, ("start",)),
    "max": (max, ("default", "key")),
    "min": (min, ("default", "key")),
    "sorted": (sorted, ("key", "reverse")),
    "enumerate": (enumerate, ("start",)),
    **{function.__name__: (function, ()) for function in (len, abs, list, tuple, reversed, zip, any, all, bool)},
    "range": (_range, ()),
    "str": (_string, ()),
    "int": (_integer, ()),
    "round": (_round, ()),
}
#: What `key=` may name.
KEYS: dict[str, Callable[[Any], Any]] = {"abs": abs, "len": len, "str": _string, "int": _integer}


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    require_size(len(text) + text.count(old) * len(new))
    return text.replace(old, new, count)


def _join(separator: str, parts: Iterable[str]) -> str:
    texts = list(parts)
    require_size(sum(len(text) + len(separator) for text in texts))
    return separator.join(texts)


_PLAIN_METHODS = (
    "upper lower title capitalize swapcase strip lstrip rstrip split startswith endswith count find rfind index "
    "isalpha isdigit isspace isupper islower"
)
METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: {name: getattr(str, name) for name in _PLAIN_METHODS.split()} | {"replace": _replace, "join": _join},
    list: {
        name: getattr(list, name)
        for name in "append extend insert pop remove clear index count sort reverse copy".split()
    },
}
METHOD_KEYWORDS = {"sort": ("key", "reverse"), "split": ("sep", "maxsplit")}
