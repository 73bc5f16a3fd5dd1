"""Plain values as JSON and back: all that passes between a program and its tests. Standard library only."""

from __future__ import annotations

import collections
import importlib
import itertools
from collections.abc import Callable, Iterator, KeysView, ValuesView
from typing import Any

MOST_ITEMS = 1_000_000  # of an iterator that a program returns


class Ended(BaseException):
    """The program's process has gone, or says what it must not; no `except Exception` of a test hides it."""


def encode(value: Any) -> Any:
    """Return JSON for a plain value; a subclass (Counter, bool of NumPy) counts as what it is derived from.

    Raises:
        TypeError: a value that is not plain.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind, parts in _PARTS.items():
        if isinstance(value, _TYPES[kind]):
            return [kind, parts(value)]
    name = f"{type(value).__module__}.{type(value).__name__}"
    if name in ("decimal.Decimal", "fractions.Fraction"):
        return [name, str(value)]
    if name.startswith("numpy.") and hasattr(value, "item"):
        return encode(value.item())
    raise TypeError(f"a value of type {type(value).__name__} is not plain data")


def decode(data: Any) -> Any:
    """Return the value that JSON stands for.

    Raises:
        Ended: JSON that stands for none.
    """
    if data is None or isinstance(data, bool):
        return data
    try:
        kind, parts = data
        return _BUILD[kind](parts)
    except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError) as error:
        raise Ended(f"returned what is no plain value ({type(error).__name__})") from None


def _pairs(value: Any) -> list[Any]:
    return [[encode(key), encode(item)] for key, item in dict.items(value)]


def _all(value: Any) -> list[Any]:
    return [encode(item) for item in value]


_TYPES: dict[str, Any] = {
    "str": str, "int": int, "float": float, "complex": complex, "bytes": bytes, "bytearray": bytearray,
    "list": list, "tuple": tuple, "dict": dict, "set": set, "frozenset": frozenset, "range": range,
    "deque": collections.deque, "keys": KeysView, "values": ValuesView, "iterator": Iterator,
}  # fmt: skip
_PARTS: dict[str, Callable[[Any], Any]] = {
    "str": str.__str__,
    "int": lambda value: hex(int.__index__(value)),  # decimals have a limit on their digits
    "float": float.hex,
    "complex": lambda value: [value.real.hex(), value.imag.hex()],
    "bytes": bytes.hex,
    "bytearray": bytearray.hex,
    "list": lambda value: _all(list.__iter__(value)),
    "tuple": lambda value: _all(tuple.__iter__(value)),
    "dict": _pairs,
    "set": _all,
    "frozenset": _all,
    "range": lambda value: _all((value.start, value.stop, value.step)),
    "deque": _all,
    "keys": _all,
    "values": _all,
    "iterator": lambda value: _all(itertools.islice(value, MOST_ITEMS)),
}


def _text(parts: Any) -> str:
    if type(parts) is not str:
        raise TypeError
    return parts


def _items(parts: Any) -> list[Any]:
    if type(parts) is not list:
        raise TypeError
    return [decode(part) for part in parts]


_BUILD: dict[str, Callable[[Any], Any]] = {
    "str": _text,
    "int": lambda parts: int(_text(parts), 16),
    "float": lambda parts: float.fromhex(_text(parts)),
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "bytes": lambda parts: bytes.fromhex(_text(parts)),
    "bytearray": lambda parts: bytearray.fromhex(_text(parts)),
    "list": _items,
    "tuple": lambda parts: tuple(_items(parts)),
    "dict": lambda parts: {decode(key): decode(item) for key, item in parts},
    "set": lambda parts: set(_items(parts)),
    "frozenset": lambda parts: frozenset(_items(parts)),
    "range": lambda parts: range(*_items(parts)),
    "decimal.Decimal": lambda parts: importlib.import_module("decimal").Decimal(_text(parts)),
    "fractions.Fraction": lambda parts: importlib.import_module("fractions").Fraction(_text(parts)),
    "deque": lambda parts: collections.deque(_items(parts)),
    "keys": lambda parts: dict.fromkeys(_items(parts)).keys(),
    "values": lambda parts: dict(enumerate(_items(parts))).values(),
    "iterator": lambda parts: iter(_items(parts)),
}
