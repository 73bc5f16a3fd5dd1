"""Tables as text: a frame as Markdown, rows of cells in columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def markdown_table(frame: pd.DataFrame) -> str:
    """Return a frame as a GitHub table, its columns not padded."""
    lines = [frame.columns.tolist(), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aligned(rows: Sequence[Sequence[str]], ruled: bool = False, left: int = 2) -> list[str]:
    """Return rows of cells as lines of columns, the first ones flush left and the others right.

    Args:
        rows: the header first.
        ruled: whether a line of dashes stands below the header.
        left: how many columns are flush left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *lines = (
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [header, *(["  ".join("-" * w for w in widths)] if ruled else []), *lines]
