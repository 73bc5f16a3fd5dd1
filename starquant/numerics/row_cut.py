"""Rows cut at shares of their largest and smallest number, which gradients pass in few passes over the numbers.

Shapes: O rows, I numbers of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cut_rows(x_OI: Tensor, ratio_O2: Tensor) -> Tensor:
    """Return clamp(x, r_low min(x), r_high max(x)) of each row, differentiable by x and by (r_high, r_low).

    Args:
        x_OI: rows with numbers on both sides of zero.
        ratio_O2: above 0, at most 1.
    """
    cut: Tensor = _CutRows.apply(x_OI, ratio_O2)
    return cut


class _CutRows(torch.autograd.Function):
    """What is cut passes its gradient to the end that cuts it, and so to the largest or smallest number."""

    @staticmethod
    def forward(ctx: Any, x_OI: Tensor, ratio_O2: Tensor) -> Tensor:
        """Return the cut rows."""
        (high_O1, high_at), (low_O1, low_at) = x_OI.max(1, keepdim=True), x_OI.min(1, keepdim=True)
        upper_O1, lower_O1 = high_O1 * ratio_O2[:, :1], low_O1 * ratio_O2[:, 1:]
        ctx.save_for_backward(x_OI > upper_O1, x_OI < lower_O1, ratio_O2, high_O1, low_O1, high_at, low_at)
        return x_OI.clamp(lower_O1, upper_O1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the rows and of the ratios."""
        above_OI, below_OI, ratio_O2, high_O1, low_O1, high_at, low_at = ctx.saved_tensors
        gradient_OI = gradients[0]
        of_upper_O1, of_lower_O1 = ((gradient_OI * cut_OI).sum(1, keepdim=True) for cut_OI in (above_OI, below_OI))
        through_OI = gradient_OI.masked_fill(above_OI.logical_or_(below_OI), 0.0)
        through_OI.scatter_add_(1, high_at, of_upper_O1 * ratio_O2[:, :1])
        through_OI.scatter_add_(1, low_at, of_lower_O1 * ratio_O2[:, 1:])
        return through_OI, torch.cat((of_upper_O1 * high_O1, of_lower_O1 * low_O1), 1)
