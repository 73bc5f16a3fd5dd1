"""Large matrices a few rows at a time, so that what is computed in float64 on the way stays small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

#: Numbers of a chunk: 32 MB in float64.
CHUNK = 2**22


def slices(length: int, size: int) -> Iterator[slice]:
    """Yield the slices of `size` that cover a length; the last may be shorter."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def row_slices(x: Tensor, numbers: int = CHUNK) -> Iterator[slice]:
    """Yield slices of the first axis that hold at most so many numbers each, at least one row."""
    return slices(len(x), max(1, numbers // max(1, x[:1].numel())))
