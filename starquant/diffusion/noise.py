"""Which target tokens to mask, and with what weight, to estimate log p(target | prompt).

The estimate is  sum_r weight_r * sum_{i masked in r} log p(token_i | pattern r).  Masked-diffusion models define
it as an expectation over mask patterns (LLaDA eq. 6); where all 2^T - 1 patterns are no more than `mc_num`, the
expectation is summed exactly instead of sampled. A one-token target then costs one forward pass, not `mc_num`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskPatterns:
    """Mask patterns [R, T] (True: masked) and their weights [R] in float64."""

    masked_RT: Tensor
    weight_R: Tensor


class Noise(Protocol):
    """A family's distribution over mask patterns of T target tokens."""

    @property
    def append_eos(self) -> bool:
        """Whether an end-of-text token is appended to the target and stays visible."""
        ...

    def enumerate(self, masked_RT: Tensor) -> Tensor:
        """Return the exact weight of each pattern [R]."""
        ...

    def draw(self, length: int, mc_num: int, generator: torch.Generator) -> MaskPatterns:
        """Draw `mc_num` weighted patterns, stratified over mask ratios."""
        ...


@dataclass(frozen=True)
class LLaDANoise:
    """l ~ U{1..T} tokens masked uniformly at random, weight T / l (official get_log_likelihood.py)."""

    append_eos: bool = False

    def enumerate(self, masked_RT: Tensor) -> Tensor:
        """P(pattern) * T / l = 1 / (l * C(T, l))."""
        length = masked_RT.shape[1]
        return torch.tensor([1.0 / (k * math.comb(length, k)) for k in masked_RT.sum(1).tolist()], dtype=torch.float64)

    def draw(self, length: int, mc_num: int, generator: torch.Generator) -> MaskPatterns:
        """Spread the counts evenly over 1..T from one random start, whatever the batch size.

        The official code stratifies within a batch, so that its scores depend on the batch size; here all
        `mc_num` draws of a request form one stratified set. It also starts at a whole number and rounds halves
        to even, which favours even counts; a real-valued start makes every count equally likely.
        """
        start = torch.rand((), generator=generator, dtype=torch.float64) * length
        spread = torch.arange(mc_num, dtype=torch.float64) * (length / mc_num)
        count_R = torch.floor(start + spread).long() % length + 1
        rank_RT = torch.rand(mc_num, length, generator=generator).argsort(1).argsort(1)
        return MaskPatterns(rank_RT < count_R[:, None], length / count_R.double() / mc_num)


@dataclass(frozen=True)
class DreamNoise:
    """Each token masked with probability p = (1 - eps) t + eps, t ~ U(0, 1), weight 1 / p (official eval/)."""

    eps: float = 1e-3
    append_eos: bool = True

    def enumerate(self, masked_RT: Tensor) -> Tensor:
        """Integrate p^(l-1) (1-p)^(T-l) over t; Gauss-Legendre is exact for this polynomial."""
        length = masked_RT.shape[1]
        nodes, weights = np.polynomial.legendre.leggauss(length + 1)
        p = self.eps + (1 - self.eps) * (nodes + 1) / 2
        by_count = [0.0] + [
            float(np.sum(weights / 2 * p ** (k - 1) * (1 - p) ** (length - k))) for k in range(1, length + 1)
        ]
        return torch.tensor([by_count[k] for k in masked_RT.sum(1).tolist()], dtype=torch.float64)

    def draw(self, length: int, mc_num: int, generator: torch.Generator) -> MaskPatterns:
        """Stratify t over (0, 1) from one random start."""
        start = torch.rand((), generator=generator, dtype=torch.float64)
        t_R = (start + torch.arange(mc_num, dtype=torch.float64) / mc_num) % 1.0
        p_R = (1 - self.eps) * t_R + self.eps
        masked_RT = torch.rand(mc_num, length, generator=generator, dtype=torch.float64) < p_R[:, None]
        return MaskPatterns(masked_RT, 1.0 / p_R / mc_num)


def mask_patterns(
    noise: Noise, length: int, mc_num: int, generator: torch.Generator, most: int | None = None
) -> MaskPatterns:
    """Return all patterns with exact weights if at most `most` (None: `mc_num`) or only one, else `mc_num` draws."""
    if length == 1 or (length < 31 and 2**length - 1 <= (mc_num if most is None else most)):
        codes = torch.arange(1, 2**length)
        masked_RT = (codes[:, None] >> torch.arange(length)) % 2 == 1
        return MaskPatterns(masked_RT, noise.enumerate(masked_RT))
    drawn = noise.draw(length, mc_num, generator)
    keep = drawn.masked_RT.any(1)  # a pattern that masks nothing adds nothing
    return MaskPatterns(drawn.masked_RT[keep], drawn.weight_R[keep])
