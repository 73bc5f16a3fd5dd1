"""Token states, the order of every axis of states, and SGAT's gate on channels.

A token is [MASK] or it is not. Whatever has one entry a state (rows of a gate, clip ratios, statistics, maps) has them
in the order of `TokenState`: axis S, index 0 masked, 1 unmasked.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class TokenState(str, Enum):
    """Whether a token is [MASK] in the forward pass at hand; the order is that of every axis of states."""

    MASKED = "masked"
    UNMASKED = "unmasked"

    @property
    def axis(self) -> int:
        """Index on an axis of states: 0 masked, 1 unmasked."""
        return tuple(TokenState).index(self)


def state_indices(masked: Tensor) -> Tensor:
    """Return the states of tokens as indices on the axis of states, int64 [...]; `masked` is True at [MASK]."""
    return masked.logical_not().long()


def ratio_bins(ratio_B: Tensor, bins: int) -> Tensor:
    """Return the mask-ratio bin of each ratio, int64: (k/bins, (k+1)/bins] is bin k, and 0 is in bin 0.

    A ratio that lies on a bin's end up to its own dtype's rounding (float64, or float32 of a forward pass) is in it.
    """
    slack = 1e-9 if ratio_B.dtype == torch.float64 else 1e-6
    return (ratio_B * bins - slack).ceil().long().sub_(1).clamp_(0, bins - 1)


def gate_channels(width: int, d_m: int, d_u: int, device: torch.device | None = None) -> Tensor:
    """Return SGAT's gates keep_SD [2, D], float32: 1 where a state uses a channel, else 0.

    Channels are [shared | d_m that only masked tokens use | d_u that only unmasked tokens use]: one weight serves both
    (STaR-Quant, arXiv 2606.04945, SGAT: G_m and G_u are the diagonal matrices of the two rows).

    Args:
        width: D.
        d_m: channels of masked tokens only.
        d_u: channels of unmasked tokens only.
        device: of what is returned.
    """
    keep_SD = torch.ones(len(TokenState), width, dtype=torch.float32, device=device)
    keep_SD[TokenState.MASKED.axis, width - d_u :] = 0.0
    keep_SD[TokenState.UNMASKED.axis, width - d_u - d_m : width - d_u] = 0.0
    return keep_SD
