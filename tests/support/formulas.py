"""Formulas of methods, written out."""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.models.roles import BlockSites, Site

GRID = 20  # candidates of a search for scales


def rounded(x: Tensor, bits: int = 4, group: int | None = None, symmetric: bool = True) -> Tensor:
    """Round-to-nearest of every row (or of every group of a row), written out."""
    runs = x.double().reshape(len(x), -1, group or x.shape[-1])
    if not symmetric:
        return asymmetric(runs, bits).reshape(x.shape)
    scale = runs.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (torch.round(runs / scale.clamp_min(1e-30)) * scale).reshape(x.shape)


def asymmetric(runs: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Of runs that are clipped at both ends, codes 0 to 2^b - 1 around an integer zero point."""
    most = 2**bits - 1
    low, high = (
        clip * end for end in (runs.amin(-1, keepdim=True).clamp_max(0), runs.amax(-1, keepdim=True).clamp_min(0))
    )
    scale = ((high - low) / most).clamp_min(1e-30)
    zero = torch.round(-low / scale)
    return ((torch.round(runs / scale) + zero).clamp(0, most) - zero) * scale


def sharing(sites: BlockSites, site: Site, channel: int) -> list[int]:
    """The channels of a site that one output of its producer makes: several where query heads share a value head."""
    attention = sites.attention
    width, groups = attention.head_dim, attention.n_heads // attention.n_kv_heads
    if site is not Site.OUT:
        return [channel]
    head, within = divmod(channel, width)
    first = head // groups * groups
    return [h * width + within for h in range(first, first + groups)]


def lost(x_ND: Tensor, delta: Tensor) -> float:
    """||X dW^T||^2."""
    return float((x_ND @ delta.T).square().sum())


def candidate(sites: BlockSites, site: Site, x_ND: Tensor, alpha: float) -> Tensor:
    """mean|X|^alpha, averaged where heads share a value head, over the root of its extremes' product."""
    magnitude = x_ND.abs().mean(0).tolist()
    shared = [sharing(sites, site, channel) for channel in range(len(magnitude))]
    scale = [(sum(magnitude[c] for c in group) / len(group)) ** alpha for group in shared]
    return torch.tensor(scale, dtype=torch.float64) / (max(scale) * min(scale)) ** 0.5
