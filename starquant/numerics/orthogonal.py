"""Orthogonal matrices as functions of free parameters, and Kronecker products of two.

A skew-symmetric S gives the orthogonal (I - S)^-1 (I + S) (Cayley); S = 0 gives the identity, and every orthogonal
matrix without the eigenvalue -1 is reached. Shapes: D width = M N of a Kronecker product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cayley(free_DD: Tensor) -> Tensor:
    """Return the orthogonal (I - S)^-1 (I + S), S = F - F^T, in the dtype of F.

    Computed as 2 (I - S)^-1 - I, whose gradient is cheaper.
    """
    skew_DD = free_DD - free_DD.T
    identity_DD = torch.eye(len(free_DD), dtype=free_DD.dtype, device=free_DD.device)
    rotation: Tensor = 2.0 * torch.linalg.inv(identity_DD - skew_DD) - identity_DD
    return rotation


def dual(matrix_DD: Tensor) -> Tensor:
    """Return P^-T in float64: what weights are multiplied by where inputs are by P."""
    inverse_DD: Tensor = torch.linalg.inv(matrix_DD.double())
    return inverse_DD.T


def apply_kronecker(x: Tensor, a_MM: Tensor, b_NN: Tensor | None) -> Tensor:
    """Return x (A (x) B) for x [..., M * N], without building the product; None for B is the identity."""
    x_MN = x.unflatten(-1, (len(a_MM), -1))
    mapped: Tensor = (a_MM.T @ (x_MN if b_NN is None else x_MN @ b_NN)).flatten(-2)
    return mapped


def kronecker_sizes(width: int) -> tuple[int, int]:
    """Return (M, N), M N = width, M <= N as near each other as can be: the cheapest two factors."""
    small = next(m for m in range(math.isqrt(width), 0, -1) if width % m == 0)
    return small, width // small


def fermat_sizes(width: int) -> tuple[int, int]:
    """Return (M, N) = (a - b, a + b) with the smallest a for which a^2 - width is a square b^2 (FlatQuant's rule).

    The nearest two factors of equal parity. Twice an odd number has none: `kronecker_sizes` then.
    """
    if width % 4 == 2:
        return kronecker_sizes(width)
    a = math.isqrt(width - 1) + 1
    while math.isqrt(a * a - width) ** 2 != a * a - width:
        a += 1
    b = math.isqrt(a * a - width)
    return a - b, a + b
