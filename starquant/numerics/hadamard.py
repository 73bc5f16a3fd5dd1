"""Orthogonal transforms: Hadamard matrices of many orders, random orthogonal matrices and signs.

H = core (x) Sylvester: the core is the smallest matrix of Paley's first construction (order q + 1, q = 3 mod 4) or
second (order 2 (q + 1), q = 1 mod 4), q prime, such that the rest of the order is a power of two. Cores of the first
construction are not symmetric, so H and H^T differ.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from starquant.errors import ConfigError

#: Sylvester part is applied in factors of at most 2^_BITS: each is one matrix product over the whole tensor.
_BITS = 6


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _is_paley(order: int) -> bool:
    return (order % 4 == 0 and _is_prime(order - 1)) or (order % 8 == 4 and _is_prime(order // 2 - 1))


@functools.cache
def _core_order(n: int) -> int | None:
    """Return the order of the smallest core that leaves a power of two; None when no construction is known."""
    if n < 1:
        return None
    order = n // (n & -n)
    if order == 1:
        return 1
    while n % order == 0:
        if _is_paley(order):
            return order
        order *= 2
    return None


def has_hadamard(n: int) -> bool:
    """Return whether `hadamard_matrix(n)` exists here."""
    return _core_order(n) is not None


def _factors(n: int) -> list[int]:
    """Return the orders whose Kronecker product, in this order, is the transform: a Paley core, then powers of two."""
    core = _core_order(n)
    if core is None:
        raise ConfigError(
            f"Hadamard transform: got order {n}, for which no construction is known here; allowed: powers of two, and "
            "powers of two times q + 1 (q a prime, 3 mod 4) or 2(q + 1) (q a prime, 1 mod 4)"
        )
    bits = (n // core).bit_length() - 1
    pieces = -(-bits // _BITS)
    powers = [1 << ((bits + i) // pieces) for i in range(pieces)]
    return [core, *powers] if core > 1 or not powers else powers


def _paley(order: int) -> Tensor:
    first = _is_prime(order - 1)
    q = order - 1 if first else order // 2 - 1
    index = torch.arange(q)
    character = torch.full((q,), -1, dtype=torch.int8)
    character[index * index % q] = 1
    character[0] = 0
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = character[(index[:, None] - index) % q]
    identity = torch.eye(q + 1, dtype=torch.int8)
    if first:  # skew-symmetric S with S S^T = q I, and H = I + S
        conference[1:, 0] = -1
        return conference + identity
    both = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, both) + torch.kron(identity, diagonal)


@functools.cache
def _signs(order: int) -> Tensor:
    """Return one factor with entries +-1, int8."""
    with torch.inference_mode(False):  # cached tensors must serve autograd later
        if order & (order - 1):
            return _paley(order)
        matrix = torch.ones(1, 1, dtype=torch.int8)
        for _ in range(order.bit_length() - 1):
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return matrix


@functools.lru_cache(maxsize=64)
def _factor(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one normalised factor."""
    with torch.inference_mode(False):
        return (_signs(order).double() / math.sqrt(order)).to(device, dtype)


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return H [n, n] with entries +-1/sqrt(n) and H H^T = I.

    Raises:
        ConfigError: no construction of this order is known.
    """
    return hadamard_signs(n).to(dtype, copy=True).div_(math.sqrt(n))


def hadamard_signs(n: int, device: torch.device | None = None) -> Tensor:
    """Return sqrt(n) H [n, n], float32: signs. Raises ConfigError as `hadamard_matrix`."""
    return functools.reduce(torch.kron, (_signs(order) for order in _factors(n))).float().to(device)


@functools.lru_cache(maxsize=16)
def hadamard_pair(n: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return (A [a, a], B [b, b]) of signs, float32, with A (x) B = sqrt(n) H and a, b as near each other as can be.

    Raises:
        ConfigError: no construction of this order is known.
    """
    core = _factors(n)[0] if n & (n - 1) else 1
    powers = (n // core).bit_length() - 1
    left = min(range(powers + 1), key=lambda i: abs(math.log2(core) + 2 * i - powers))
    a = torch.kron(_signs(core), _signs(1 << left)) if core > 1 else _signs(1 << left)
    with torch.inference_mode(False):
        return a.float().to(device), _signs(1 << (powers - left)).float().to(device)


def apply_hadamard(x: Tensor, transpose: bool = False) -> Tensor:
    """Return x H, or x H^T, for x [..., n] without building H.

    Half types are transformed in float32 and cast back. Weights [out, in] fold as W' = apply_hadamard(W): then
    apply_hadamard(x) W'^T = x W^T.

    Raises:
        ConfigError: no construction of this order is known.
        TypeError: `x` is not floating-point.
    """
    if not x.is_floating_point():
        raise TypeError(f"apply_hadamard: got {x.dtype}, needs a floating-point tensor")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype)
    rest = x.shape[-1]
    for order in _factors(rest):
        factor = _factor(order, dtype, x.device)
        rest //= order
        if rest == 1:
            y = y.reshape(-1, order) @ (factor.T if transpose else factor)
        else:
            y = torch.matmul(factor if transpose else factor.T, y.reshape(-1, order, rest))
    return y.reshape(x.shape).to(x.dtype)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Return a uniformly (Haar) distributed orthogonal matrix [n, n], float64, on the generator's device."""
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device=generator.device)
    q, r = torch.linalg.qr(gaussian)
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # QR alone fixes signs, and is then not uniform
    return signed


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """Return n independent signs +-1, float64, on the generator's device."""
    return torch.randint(0, 2, (n,), generator=generator, device=generator.device).double() * 2 - 1
