"""Activations as integers: codes and one scale a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """SGAT's gate on channels [shared | masked only | others only]: what a token's state does not use is zero.

    Attributes:
        masked: which tokens are masked [...].
        d_m: channels of masked tokens only.
        d_u: channels of the others only.
    """

    masked: Tensor
    d_m: int
    d_u: int


@dataclass(frozen=True)
class IntegerTokens:
    """What the linears of a site read.

    Attributes:
        codes: int8 [..., K].
        scale: float32 [..., 1].
        dtype: of the activations, and of what comes out of a linear.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
