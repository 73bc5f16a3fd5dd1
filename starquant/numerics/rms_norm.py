"""Root-mean-square norm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Return g x / sqrt(mean(x^2) + eps) of the last dimension: in float32, the gain in the input's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return gain_D * y.to(x.dtype)
