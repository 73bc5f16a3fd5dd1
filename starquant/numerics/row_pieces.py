"""Functions of rows, computed on a CPU for some rows at a time: each step reads from cache what the last has written.

Whole activations of a large model (512 x 12,288 numbers in float32 are 25 MB) go to memory and back between two steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Numbers that a thread takes at a time.
PIECE = 2**17


def rows_at_once(width: int) -> int:
    """Return how many rows of so many numbers all threads take at a time, at least one."""
    return max(1, PIECE * torch.get_num_threads() // max(1, width))


def by_rows(function: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, per_row: Tensor | None = None) -> Tensor:
    """Return function(x, per_row), in pieces where x is large, contiguous, on a CPU and in need of no gradient.

    Args:
        function: maps each row of x [..., D] to one of the same size and dtype, by itself and its entry of `per_row`.
        x: rows.
        per_row: [..., *], with the leading dimensions of x; None for none.
    """
    whole = x.device.type != "cpu" or not x.is_contiguous() or (x.requires_grad and torch.is_grad_enabled())
    if torch.compiler.is_compiling() or whole:
        return function(x, per_row)
    size, leading = rows_at_once(x.shape[-1]), x.shape[:-1]
    if leading.numel() < 2 * size:
        return function(x, per_row)
    y = torch.empty_like(x)
    rows, targets = x.flatten(0, -2).split(size), y.flatten(0, -2).split(size)
    parts = [None] * len(rows) if per_row is None else per_row.flatten(0, len(leading) - 1).split(size)
    for row, target, part in zip(rows, targets, parts, strict=True):
        target.copy_(function(row, part))
    return y
