"""Root-mean-square norm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Return g x / sqrt(mean(x^2) + eps) of the last dimension: in float32, the gain in the input's dtype."""
    if x.dtype == gain_D.dtype == torch.float32 and x.device.type == "cpu":
        return F.rms_norm(x, x.shape[-1:], gain_D, eps)  # the same operations, in one call
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return gain_D * y.to(x.dtype)
