"""Whether what a model wrote after a prompt is right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starquant.testbed.smol.tasks.python_subset import solves

_FINAL = re.compile(r"The answer is (-?[0-9]+(?:[.,][0-9]+)*)")


def final_number(text: str) -> str | None:
    """Return the number after the last "The answer is"."""
    numbers = _FINAL.findall(text)
    return numbers[-1] if numbers else None


def first_line(text: str) -> str:
    """Return the first line with something in it, without the spaces around it."""
    return text.strip().partition("\n")[0].strip()


def is_right(row: Mapping[str, Any], text: str) -> bool:
    """Score a text for an item as it is shipped: by its last number, its first line, or what the function returns."""
    if row["task"] == "programs":
        return solves(row["prompt"] + text, row["entry_point"], row["cases"])
    read = final_number if row["task"] == "sums" else first_line
    return read(text) == read(row["answer"])
