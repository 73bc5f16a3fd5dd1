"""What the fields of a benchmark item may hold: what lm-eval's prompts and scores take for granted of its own data."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: Says what is allowed where a value is not, None where it is.
Rule = Callable[[Any], str | None]
#: Says which field is wrong and what is allowed there, of an item whose fields are each as they should be.
Relation = Callable[[Mapping[str, Any]], tuple[str, str] | None]


def text(value: Any) -> str | None:
    """A text with something in it."""
    return None if isinstance(value, str) and value.strip() else "a text that is not empty"


def any_text(value: Any) -> str | None:
    """A text, which may be empty."""
    return None if isinstance(value, str) else "a text"


def any_value(_: Any) -> str | None:
    """Whatever stands there: a relation judges it."""
    return None


def texts(least: int, most: int | None = None) -> Rule:
    """A list of texts, from `least` to `most` of them."""
    number = f"{least} texts" if least == most else f"at least {least} texts"

    def rule(value: Any) -> str | None:
        fits = isinstance(value, list) and least <= len(value) and (most is None or len(value) <= most)
        return None if fits and all(text(one) is None for one in value) else f"a list of {number} that are not empty"

    return rule


def one_of(*allowed: str | int) -> Rule:
    """One of some values, of the same type: true is not 1."""

    def rule(value: Any) -> str | None:
        known = any(type(value) is type(one) and value == one for one in allowed)
        return None if known else ", ".join(map(repr, allowed))

    return rule


def answers(value: Any) -> str | None:
    """Texts, each marked as true (1) or false (0), some of both."""
    allowed = "{choices: texts, labels: a 0 or 1 for each, both of them used}"
    if not isinstance(value, dict) or texts(2)(value.get("choices")) is not None:
        return allowed
    labels, choices = value.get("labels"), value["choices"]
    if not isinstance(labels, list) or len(labels) != len(choices) or any(one_of(0, 1)(one) for one in labels):
        return allowed
    return None if len(set(labels)) == 2 else allowed


def lettered(value: Any) -> str | None:
    """Texts with a label each, no label twice."""
    allowed = "{text: texts, label: a text for each, none twice}"
    if not isinstance(value, dict) or texts(2)(value.get("text")) or texts(2)(value.get("label")):
        return allowed
    return None if len(value["text"]) == len(value["label"]) == len(set(value["label"])) else allowed


def with_gap(value: Any) -> str | None:
    """A sentence with one gap to fill in."""
    return None if text(value) is None and value.count("_") == 1 else "a text with one '_', the gap to fill in"


def worked_answer(value: Any) -> str | None:
    """A solution that ends with its number, as GSM8K's do."""
    fits = isinstance(value, str) and re.search(r"#### -?[0-9.,]*[0-9]", value)
    return None if fits else "a text with '#### NUMBER', the answer"


def options_that_differ(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """WinoGrande: of two equal options neither is the answer."""
    equal = item["option1"].strip() == item["option2"].strip()
    return ("option2", "another text than option1") if equal else None


def answer_among_labels(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """ARC: the answer is one of the labels."""
    labels = item["choices"]["label"]
    return None if item["answerKey"] in labels else ("answerKey", ", ".join(map(repr, labels)))


def label_among_endings(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """HellaSwag: the label is the number of an ending, as a number or a text."""
    last = len(item["endings"]) - 1
    fits = re.fullmatch("[0-9]{1,3}", str(item["label"])) and type(item["label"]) in (int, str)
    return None if fits and int(item["label"]) <= last else ("label", f"0 to {last}")


def program_to_complete(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """HumanEval: the prompt ends with the function that is asked for, and the tests are Python."""
    name = item["entry_point"]
    tree = _python(item["prompt"]) or _python(f"{item['prompt']}\n    pass\n")
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)] if tree else []
    last = defined[-1] if defined else None
    if not isinstance(last, ast.FunctionDef) or last.name != name:
        return "prompt", f"Python that ends with the beginning of the function {name!r}"
    tests = _python(item["test"])
    checks = tests and any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tests.body)
    return None if checks else ("test", "Python that defines the function 'check'")


def _python(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def short(value: Any) -> str:
    """Return a value as an error shows it, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


class Kinds:
    """What kinds of values the fields of a file have had: a reader of tables takes one kind a field."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, ...], str] = {}

    def clash(self, item: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return a field whose value is of another kind than in the lines before, and that kind; None for none."""
        for path, kind in _kinds((), item):
            if kind != "null" and self._kinds.setdefault(path, kind) != kind:
                return ".".join(path), f"{self._kinds[path]}, as in the lines before"
        return None


def _kinds(path: tuple[str, ...], value: Any) -> Iterable[tuple[tuple[str, ...], str]]:
    """Yield the kind of a value and of each of its parts, with the keys that lead there; "[]" into a list."""
    if isinstance(value, dict):
        yield path, "an object"
        for key, part in value.items():
            yield from _kinds((*path, key), part)
    elif isinstance(value, list):
        yield path, "a list"
        for part in value:
            yield from _kinds((*path, "[]"), part)
    else:
        yield path, {str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
