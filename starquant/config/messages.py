"""Pydantic's problems as one line each: dotted path, what was got, what is allowed, the nearest name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from starquant.errors import nearest

#: Characters of a value that an error shows.
LONGEST_SHOWN = 200


def explain(root: type[BaseModel], problem: Mapping[str, Any], parts: Mapping[str, type[BaseModel]]) -> str:
    """Turn one pydantic problem into 'path: got X, allowed: Y. Did you mean Z?'.

    Args:
        root: class of the whole.
        problem: one of `ValidationError.errors()`.
        parts: classes of those fields of `root` whose class the configuration itself chooses.
    """
    location = problem["loc"]
    path = ".".join(map(str, location))
    kind, message, got = problem["type"], problem["msg"], problem.get("input")
    shown = _shown(got)
    if kind == "extra_forbidden":
        names = _fields_at(root, location[:-1], parts)
        hint = f"; allowed: {', '.join(names)}.{nearest(str(location[-1]), names)}" if names else ""
        return f"{path}: unknown key{hint}"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return text if not path or text.startswith(path) else f"{path}: {text}"
    if kind == "literal_error":
        allowed = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        of_texts = "'" in problem["ctx"]["expected"]
        hint = nearest(got, allowed.split(", ")) if isinstance(got, str) and of_texts else ""
        return f"{path}: got {shown}, allowed: {allowed}.{hint}"
    if kind == "tuple_type":
        return f"{path}: got {shown}, allowed: a list, [{got}]"
    allowed = message[0].lower() + message[1:]
    return f"{path}: got {shown}, allowed: {allowed.removeprefix('input should be ').removeprefix('a ')}"


def _shown(got: Any) -> str:
    """Return a value as a line that can be read."""
    text = repr(got)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"


def _fields_at(root: type[BaseModel], location: list[Any], parts: Mapping[str, type[BaseModel]]) -> list[str]:
    here: Any = root
    for depth, part in enumerate(location):
        fields = getattr(here, "model_fields", {})
        if part not in fields:
            return []
        here = parts[part] if depth == 0 and part in parts else fields[part].annotation
    return list(getattr(here, "model_fields", {}))
