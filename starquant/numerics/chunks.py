"""Large matrices a few rows at a time, so that what is computed in float64 on the way stays small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

#: Numbers of a chunk: 32 MB in float64.
CHUNK = 2**22


def row_slices(x: Tensor, numbers: int = CHUNK) -> Iterator[slice]:
    """Yield slices of the first axis that hold at most so many numbers each, at least one row."""
    rows = max(1, numbers // max(1, x[:1].numel()))
    for start in range(0, len(x), rows):
        yield slice(start, min(start + rows, len(x)))
