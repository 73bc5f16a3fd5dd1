"""Cayley maps and Kronecker products against closed forms, `torch.kron` and brute force."""

from __future__ import annotations

import math

import pytest
import torch

from starquant.numerics import apply_kronecker, cayley, kronecker_sizes


def _free(width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(width, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64).to(dtype)


def test_zero_and_everything_symmetric_give_the_identity() -> None:
    assert torch.equal(cayley(torch.zeros(5, 5)), torch.eye(5))
    free = _free(5)
    assert torch.equal(cayley(free + free.T), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("t", [-3.0, -0.2, 0.7, 40.0])
def test_two_by_two_is_the_rotation_by_twice_the_arc_tangent(t: float) -> None:
    angle = 2 * math.atan(t)
    expected = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]).double()
    free = torch.tensor([[5.0, t + 2.0], [2.0, -1.0]], dtype=torch.float64)  # F - F^T = [[0, t], [-t, 0]]
    assert torch.allclose(cayley(free), expected, atol=1e-12)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_a_rotation_in_the_dtype_of_its_parameters(dtype: torch.dtype, atol: float) -> None:
    rotation = cayley(_free(9, dtype))
    assert rotation.dtype == dtype
    assert torch.allclose(rotation @ rotation.T, torch.eye(9, dtype=dtype), atol=atol)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1.0, abs=100 * atol)


def test_every_rotation_without_a_half_turn_is_reached() -> None:
    free = _free(6)
    rotation = torch.linalg.matrix_exp(0.4 * (free - free.T))  # orthogonal by another map
    identity = torch.eye(6, dtype=torch.float64)
    skew = (rotation - identity) @ torch.linalg.inv(rotation + identity)
    for parameters in (skew / 2, skew.triu()):
        assert torch.allclose(cayley(parameters), rotation, atol=1e-12)


def test_the_transpose_is_the_inverse_of_the_negative() -> None:
    assert torch.allclose(cayley(-_free(7)), cayley(_free(7)).T, atol=1e-12)
    assert not torch.allclose(cayley(_free(7)), cayley(_free(7)).T, atol=0.1)


def test_gradients_of_the_parameters() -> None:
    free = _free(4).requires_grad_()
    assert torch.autograd.gradcheck(cayley, (free,))
    # At zero cayley(F) = I + 2 (F - F^T) + ..., so a gradient G comes back as 2 (G - G^T).
    start, weight = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True), _free(4)
    (cayley(start) * weight).sum().backward()
    assert start.grad is not None
    assert torch.allclose(start.grad, 2 * (weight - weight.T), atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(3, 5), (5, 3), (1, 7), (7, 1), (4, 4)])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
def test_kronecker_equals_the_product_written_out(m: int, n: int, leading: tuple[int, ...]) -> None:
    a, b = _free(m), _free(n + 1)[:n, :n]  # not symmetric, and of another seed
    x = torch.randn(*leading, m * n, dtype=torch.float64)
    assert torch.allclose(apply_kronecker(x, a, b), x @ torch.kron(a, b), atol=1e-12)


def test_kronecker_of_a_unit_vector_is_a_row_of_the_product() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0, 7.0], [8.0, 9.0, 10.0], [0.0, 1.0, 2.0]])
    x = torch.zeros(6)
    x[4] = 1.0  # row 1 of A, row 1 of B
    assert apply_kronecker(x, a, b).tolist() == [24.0, 27.0, 30.0, 32.0, 36.0, 40.0]


def test_kronecker_gradients() -> None:
    a, b = _free(2).requires_grad_(), _free(3).requires_grad_()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(apply_kronecker, (x, a, b))


def test_sizes_are_the_nearest_pair_of_factors() -> None:
    for width in range(1, 300):
        pairs = [(m, width // m) for m in range(1, width + 1) if width % m == 0 and m <= width // m]
        assert kronecker_sizes(width) == min(pairs, key=lambda pair: pair[1] - pair[0]), width


@pytest.mark.parametrize(
    ("width", "sizes"), [(4096, (64, 64)), (12288, (96, 128)), (3584, (56, 64)), (18944, (128, 148)), (7919, (1, 7919))]
)
def test_sizes_of_published_widths(width: int, sizes: tuple[int, int]) -> None:
    assert kronecker_sizes(width) == sizes


def test_one_factor_alone_leaves_what_is_behind_it() -> None:
    x, a = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).double(), _free(4)
    assert torch.allclose(apply_kronecker(x, a, None), x @ torch.kron(a, torch.eye(3).double()))
