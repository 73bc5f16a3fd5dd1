"""Hadamard transforms against explicit matrices, and these against their definition."""

from __future__ import annotations

import math

import pytest
import torch

from starquant.errors import ConfigError
from starquant.numerics import (
    apply_hadamard,
    hadamard_matrix,
    hadamard_pair,
    has_hadamard,
    random_orthogonal,
    random_signs,
)

POWERS = [2**k for k in range(11)]
SMALL = [12, 20, 28, 36, 40, 96, 108, 148, 224, 296, 384, 1536, 3584, 4096]
LARGE = [12288, 14336, 18944]
CORES = {12288: 12, 14336: 28, 18944: 148}


def _rows(n: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def _sylvester(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Entry (i, j): -1 to the number of bits that both indices have."""
    both, parity = i & j, torch.zeros_like(i & j)
    while bool(both.any()):
        parity, both = parity ^ (both & 1), both >> 1
    return 1 - 2 * parity


@pytest.mark.parametrize("n", POWERS + SMALL)
def test_matrices_are_hadamard(n: int) -> None:
    signs = (hadamard_matrix(n, torch.float32) * math.sqrt(n)).round_()
    assert bool((signs.abs() == 1).all())
    assert torch.equal(signs @ signs.T, n * torch.eye(n))  # sums of integers: exact
    if n <= 512:
        h = hadamard_matrix(n)
        assert h.dtype == torch.float64
        assert torch.allclose(h @ h.T, torch.eye(n, dtype=torch.float64), atol=1e-13)


@pytest.mark.parametrize("n", POWERS + SMALL)
def test_transform_equals_the_explicit_matrix_on_both_sides(n: int) -> None:
    x, h = _rows(n), hadamard_matrix(n)
    assert torch.allclose(apply_hadamard(x), x @ h, atol=1e-11)
    assert torch.allclose(apply_hadamard(x, transpose=True), x @ h.T, atol=1e-11)


@pytest.mark.parametrize("n", LARGE)
def test_large_transforms_equal_explicit_columns(n: int) -> None:
    x, core = _rows(n), hadamard_matrix(CORES[n])
    rest = n // CORES[n]
    index, columns = torch.arange(n)[:, None], torch.tensor([0, 1, 130, rest, rest + 7, n // 2 + 5, n - 2, n - 1])
    entries = _sylvester(index % rest, columns % rest).double() / math.sqrt(rest)
    assert torch.allclose(
        apply_hadamard(x)[:, columns], x @ (core[index // rest, columns // rest] * entries), atol=1e-11
    )
    assert torch.allclose(
        apply_hadamard(x, transpose=True)[:, columns],
        x @ (core[columns // rest, index // rest] * entries),
        atol=1e-11,
    )


@pytest.mark.parametrize("n", LARGE)
def test_large_transforms_are_inverted_by_their_transpose_and_keep_norms(n: int) -> None:
    x = _rows(n)
    assert torch.allclose(apply_hadamard(apply_hadamard(x), transpose=True), x, atol=1e-12)
    assert torch.allclose(apply_hadamard(x).norm(dim=1), x.norm(dim=1), rtol=1e-12)


def test_the_sides_differ_for_paley_one_and_not_for_sylvester() -> None:
    for n, symmetric in ((12, False), (20, False), (108, False), (384, False), (28, True), (148, True), (64, True)):
        h = hadamard_matrix(n)
        assert torch.equal(h, h.T) == symmetric, n


@pytest.mark.parametrize("n", [28, 64, 96, 224, 296])
def test_folded_weights_undo_the_transform_of_the_input(n: int) -> None:
    x, weight = _rows(n, 5), _rows(n + 1, 7)[:, :n]
    assert torch.allclose(apply_hadamard(x) @ apply_hadamard(weight).T, x @ weight.T, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_are_transformed_in_float32(dtype: torch.dtype) -> None:
    x = _rows(384).to(dtype).view(1, 3, 384)
    before = x.clone()
    y = apply_hadamard(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert torch.equal(y, apply_hadamard(x.float()).to(dtype))
    assert torch.allclose(apply_hadamard(x.float()).double(), apply_hadamard(x.double()), atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", [3, 6, 7, 92, 118, 172, 0])
def test_unknown_orders_are_named(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(ConfigError, match=rf"order {n}, .*allowed: powers of two"):
        hadamard_matrix(n)


def test_known_orders() -> None:
    assert all(has_hadamard(n) for n in POWERS + SMALL + LARGE)
    assert has_hadamard(11008)  # 5503 is prime; no smaller core is known by Paley


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        apply_hadamard(torch.ones(2, 8, dtype=torch.int64))


def test_factors_cached_under_inference_serve_autograd() -> None:
    with torch.inference_mode():
        apply_hadamard(torch.ones(1, 44))
    x = torch.ones(1, 44, requires_grad=True)
    apply_hadamard(x).square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x.detach(), atol=1e-5)


def test_random_orthogonal_is_orthogonal_seeded_and_has_no_preferred_sign() -> None:
    def make(seed: int) -> torch.Tensor:
        return random_orthogonal(24, torch.Generator().manual_seed(seed))

    q = make(0)
    assert q.dtype == torch.float64
    assert torch.allclose(q @ q.T, torch.eye(24, dtype=torch.float64), atol=1e-13)
    assert torch.equal(q, make(0))
    assert not torch.equal(q, make(1))
    # A Haar matrix has a mean of 0; without the sign fix the diagonal of plain QR is biased.
    first = torch.stack([make(seed)[0, 0] for seed in range(300)])
    assert float(first.mean().abs()) < 4 / math.sqrt(24 * 300)


def test_random_signs_are_balanced_and_seeded() -> None:
    signs = random_signs(4000, torch.Generator().manual_seed(0))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.07
    assert torch.equal(signs, random_signs(4000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("n", [1, 2, 12, 20, 28, 64, 96, 148, 1536, 3584])
def test_the_pair_of_signs_is_the_transform(n: int) -> None:
    a, b = hadamard_pair(n)
    assert len(a) * len(b) == n and set(a.flatten().tolist()) | set(b.flatten().tolist()) <= {1.0, -1.0}
    torch.testing.assert_close(torch.kron(a, b).double() / n**0.5, hadamard_matrix(n), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "sizes"), [(4096, (64, 64)), (12288, (96, 128)), (18944, (148, 128))])
def test_the_pair_is_as_square_as_can_be(n: int, sizes: tuple[int, int]) -> None:
    assert tuple(len(part) for part in hadamard_pair(n)) == sizes
