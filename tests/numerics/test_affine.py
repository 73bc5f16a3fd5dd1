"""Moments of pairs against numpy, and the maps solved from them against planted and slowly found answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from starquant.errors import ConfigError, DataError
from starquant.numerics import PairMoments, moment_matching, ridge_least_squares

SOLVERS = [moment_matching, ridge_least_squares]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _pair(tokens: int = 300, width: int = 12) -> tuple[Tensor, Tensor]:
    """z with correlated channels and means, q a noisy distortion of it."""
    z = _randn(tokens, width) @ _randn(width, width, seed=1) + torch.arange(width)
    return z, z @ (torch.eye(width) + 0.2 * _randn(width, width, seed=2)) + 0.5 * _randn(tokens, width, seed=3) - 1


def _moments(z: Tensor, q: Tensor, block: int, *sizes: int) -> PairMoments:
    moments, sizes = PairMoments(block), (*sizes, len(z) - sum(sizes))
    for a, b in zip(z.split(sizes), q.split(sizes), strict=True):
        moments.update(a, b)
    return moments


def _blocks(x: Tensor, block: int) -> list[np.ndarray]:
    return [x[:, n : n + block].double().numpy() for n in range(0, x.shape[1], block)]


def _spd(block: int, seed: int) -> Tensor:
    a = _randn(block, block, seed=seed)
    return a @ a.T / block + torch.eye(block)


def _white(tokens: int, width: int) -> Tensor:
    """Numbers whose sample mean is exactly 0 and sample covariance exactly I."""
    columns = torch.cat((torch.ones(tokens, 1, dtype=torch.float64), _randn(tokens, width, seed=9)), 1)
    return torch.linalg.qr(columns).Q[:, 1:] * tokens**0.5


def _assert_central(moments: PairMoments, z: Tensor, q: Tensor, block: int) -> None:
    mean_z, mean_q, zz, zq, qq = moments.central()
    for n, (a, b) in enumerate(zip(_blocks(z, block), _blocks(q, block), strict=True)):
        joint = np.cov(a.T, b.T, bias=True)
        for got, expected in (
            (mean_z[n], a.mean(0)),
            (mean_q[n], b.mean(0)),
            (zz[n], joint[:block, :block]),
            (zq[n], joint[:block, block:]),
            (qq[n], joint[block:, block:]),
        ):
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("block", [3, 4, 12])
def test_moments_are_the_covariances_of_each_block(block: int) -> None:
    z, q = _pair()
    moments = _moments(z, q, block, 1, 0, 17, 200)
    assert moments.count == 300
    _assert_central(moments, z, q, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_float64_whatever_the_inputs(dtype: torch.dtype) -> None:
    z, q = ((100 + x).to(dtype) for x in _pair(2000))
    _assert_central(_moments(z, q, 4, 1000), z, q, 4)


def test_merged_as_if_seen_together() -> None:
    z, q = _pair()
    first, second, empty = _moments(z[:77], q[:77], 4), _moments(z[77:], q[77:], 4), PairMoments(4)
    for other in (second, first, PairMoments(4)):
        empty.merge(other)
    first.merge(second)
    first.merge(PairMoments(4))
    for moments in (first, empty):
        assert moments.count == 300
        _assert_central(moments, z, q, 4)
    _assert_central(second, z[77:], q[77:], 4)  # left as it was
    empty.update(z, q)
    assert (second.count, first.count, empty.count) == (223, 300, 600)
    _assert_central(first, z, q, 4)


@pytest.mark.parametrize(("of", "width", "block"), [(3, 4, 2), (2, 6, 3), (6, 2, 2), (1, 4, 4)])
def test_pooled_over_heads_that_share_values(of: int, width: int, block: int) -> None:
    """As if the heads of a run were more tokens of one head."""
    z, q = _pair()
    moments = _moments(z, q, block, 50)
    pooled = moments.pooled(of, width)
    run = of * width
    for start in range(0, 12, run):
        stacked = []
        for x in (z, q):
            stacked.append(torch.cat([x[:, start + h * width : start + (h + 1) * width] for h in range(of)]))
        expected = _moments(*stacked, block).central()
        for head in range(of):
            first = (start + head * width) // block
            for got, wanted in zip(pooled.central(), expected, strict=True):
                torch.testing.assert_close(got[first : first + width // block], wanted, rtol=1e-9, atol=1e-10)
    assert pooled.count == 300 * of
    _assert_central(moments, z, q, block)


@pytest.mark.parametrize("block", [4, 12])
def test_matched_outputs_have_the_mean_and_covariance_of_the_exact_ones(block: int) -> None:
    z, q = _pair()
    matrix, shift = moment_matching(_moments(z, q, block), damping=1e-12)
    assert (matrix.shape, shift.shape) == ((12 // block, block, block), (12 // block, block))
    for n, (a, b) in enumerate(zip(_blocks(z, block), _blocks(q, block), strict=True)):
        mapped = b @ matrix[n].numpy().T + shift[n].numpy()
        np.testing.assert_allclose(mapped.mean(0), a.mean(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.cov(mapped.T, bias=True), np.cov(a.T, bias=True), rtol=1e-6, atol=1e-6)


def _planted(damping: float = 0.0) -> tuple[PairMoments, Tensor, Tensor, Tensor]:
    """Moments with C^1/2 = A and K^1/2 = B up to damping, and (A, B, means); no C commutes with its K."""
    a, b = (torch.stack([_spd(4, seed + n) for n in range(3)]) for seed in (20, 30))
    means = _randn(2, 12, seed=5)
    white = _white(200, 12)
    roots = []
    for root in (a, b):
        square = root @ root  # what has the root A once its damping is added: A^2 - l I, l = damping x mean variance
        level = damping * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] / (1 + damping)
        roots.append(torch.block_diag(*torch.linalg.cholesky(square - level * torch.eye(4)).mT))
    z, q = (white @ root + mean for root, mean in zip(roots, means, strict=True))
    return _moments(z, q, 4), a, b, means.view(2, 3, 4)


@pytest.mark.parametrize("damping", [1e-13, 0.01, 0.1])
def test_moment_matching_is_the_product_of_roots_of_damped_covariances(damping: float) -> None:
    moments, a, b, (mean_z, mean_q) = _planted(damping)
    matrix, shift = moment_matching(moments, damping)
    expected = a @ torch.linalg.inv(b)
    assert torch.allclose(matrix, expected, atol=1e-8)
    assert torch.allclose(shift, mean_z - torch.einsum("nog,ng->no", expected, mean_q), atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.25, 1.0])
def test_smoothing_moves_towards_the_nearest_orthogonal_matrix(smoothing: float) -> None:
    moments, a, b, (mean_z, mean_q) = _planted()
    polar = a @ torch.linalg.inv(b)
    for _ in range(40):  # Newton's iteration for the polar factor: no singular value is computed
        polar = (polar + torch.linalg.inv(polar).mT) / 2
    expected = (1 - smoothing) * a @ torch.linalg.inv(b) + smoothing * polar
    matrix, shift = moment_matching(moments, 1e-13, smoothing)
    assert torch.allclose(matrix, expected, atol=1e-8)
    assert torch.allclose(shift, mean_z - torch.einsum("nog,ng->no", expected, mean_q), atol=1e-8)


def test_full_smoothing_of_channels_that_are_only_rescaled_is_the_identity() -> None:
    z = _white(200, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    moments = _moments(z, z * torch.tensor([0.5, 1.5, 2.0, 0.7]), 4)
    plain, _ = moment_matching(moments, 1e-12)
    assert torch.allclose(plain[0].diagonal(), 1 / torch.tensor([0.5, 1.5, 2.0, 0.7]).double(), rtol=1e-6)
    assert torch.allclose(moment_matching(moments, 1e-12, 1.0)[0][0], torch.eye(4).double(), atol=1e-9)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_shrinkage_goes_to_the_identity_and_the_mean_stays_right(solve: Callable, shrinkage: float) -> None:
    z, q = _pair()
    moments = _moments(z, q, 4)
    plain, _ = solve(moments, 0.05)
    matrix, shift = solve(moments, 0.05, shrinkage=shrinkage)
    assert float((plain - torch.eye(4)).abs().amax()) > 0.1
    assert torch.allclose(matrix, plain + shrinkage * (torch.eye(4) - plain), atol=1e-12)
    mapped = torch.einsum("nog,tng->tno", matrix, q.unflatten(1, (3, 4))) + shift
    assert torch.allclose(mapped.mean(0).flatten(), z.mean(0), atol=1e-9)


def test_least_squares_recovers_a_planted_map() -> None:
    _, q = _pair()
    matrix, shift = _randn(3, 4, 4, seed=6), _randn(3, 4, seed=7)
    z = (torch.einsum("nog,tng->tno", matrix, q.unflatten(1, (3, 4))) + shift).flatten(1)
    got_matrix, got_shift = ridge_least_squares(_moments(z, q, 4), 1e-13)
    assert torch.allclose(got_matrix, matrix, atol=1e-8)
    assert torch.allclose(got_shift, shift, atol=1e-7)


@pytest.mark.parametrize("damping", [1e-6, 0.05, 3.0])
@pytest.mark.parametrize("block", [4, 12])
def test_least_squares_is_the_ridge_solution_of_stacked_rows(block: int, damping: float) -> None:
    """min |Z - Q M^T|^2 / T + l |M - I|^2 by numpy, on centred rows with l's rows below."""
    z, q = _pair()
    matrix, shift = ridge_least_squares(_moments(z, q, block), damping)
    for n, (a, b) in enumerate(zip(_blocks(z, block), _blocks(q, block), strict=True)):
        level = damping * b.var(0).mean()
        below = np.sqrt(len(a) * level) * np.eye(block)
        rows, targets = np.vstack((b - b.mean(0), below)), np.vstack((a - a.mean(0), below))
        expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
        np.testing.assert_allclose(matrix[n].numpy(), expected, atol=1e-8)
        np.testing.assert_allclose(shift[n].numpy(), a.mean(0) - expected @ b.mean(0), atol=1e-7)


def test_huge_damping_leaves_only_the_means_to_correct() -> None:
    z, q = _pair()
    matrix, shift = ridge_least_squares(_moments(z, q, 4), 1e9)
    assert torch.allclose(matrix, torch.eye(4).double().expand(3, 4, 4), atol=1e-6)
    assert torch.allclose(shift.flatten(), (z - q).mean(0), atol=1e-4)


@pytest.mark.parametrize("solve", SOLVERS)
def test_nothing_lost_is_nothing_changed(solve: Callable) -> None:
    z, _ = _pair()
    matrix, shift = solve(_moments(z, z, 4), 0.05)
    assert torch.allclose(matrix, torch.eye(4).double().expand(3, 4, 4), atol=1e-9)
    assert torch.allclose(shift, torch.zeros(3, 4).double(), atol=1e-8)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("constant", [0.0, 0.1, -300.0])
@pytest.mark.parametrize("channels", [slice(1, 2), slice(4, 8)], ids=["one channel", "a block"])
@pytest.mark.parametrize("dead", ["z", "q", "both"])
def test_constant_channels_give_no_nan_and_the_right_mean(
    solve: Callable, constant: float, channels: slice, dead: str
) -> None:
    z, q = (x.clone() for x in _pair())
    for name, x in (("z", z), ("q", q)):
        if dead in (name, "both"):
            x[:, channels] = constant
    matrix, shift = solve(_moments(z, q, 4), 0.01)
    assert bool(torch.isfinite(matrix).all() & torch.isfinite(shift).all())
    mapped = (torch.einsum("nog,tng->tno", matrix, q.unflatten(1, (3, 4))) + shift).flatten(1)
    scale = 1 + 1e-3 * float(matrix.abs().amax())  # a huge M rounds in the mean that it maps
    assert torch.allclose(mapped.mean(0), z.mean(0), atol=1e-6 * scale)
    if dead == "z":
        assert float(mapped[:, channels].std(0).amax()) < 0.5 * float(q[:, channels].std(0).amin())


def test_channels_that_repeat_each_other_give_no_nan() -> None:
    """Covariances of rank two, whose other eigenvalues are rounding errors of either sign, larger than the damping."""
    z, q = (1e3 * torch.cat((x[:, :2], x[:, :2] @ _randn(2, 10, seed=8)), 1) for x in _pair())
    assert bool(torch.isfinite(moment_matching(_moments(z, q, 12), 1e-30)[0]).all())


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_too_few_tokens_are_named(solve: Callable, tokens: int) -> None:
    z, q = _pair()
    moments = _moments(z[:tokens], q[:tokens], 4) if tokens else PairMoments(4)
    with pytest.raises(DataError, match=f"affine correction: got {tokens} tokens, needed: two or more"):
        solve(moments, 0.01)


def test_widths_and_values_that_do_not_fit_are_named() -> None:
    z, q = _pair()
    with pytest.raises(ConfigError, match="block size: got 5, which does not divide the width 12"):
        PairMoments(5).update(z, q)
    for side in (0, 1):
        pair = [z.clone(), q.clone()]
        pair[side][3, 3] = float("nan")
        moments = PairMoments(4)
        with pytest.raises(DataError, match="attention output: holds values that are not finite"):
            moments.update(*pair)
        assert moments.count == 0


@pytest.mark.parametrize("constant", [0.0, 3.7, 100.0])
def test_a_block_that_never_varies_is_only_shifted(constant: float) -> None:
    """Rounded to nothing in calibration, it must not be blown up when it moves at run time."""
    moments = PairMoments(4)
    moments.update(torch.randn(500, 4), torch.full((500, 4), constant) * torch.tensor([1.0, 2.0, -1.0, 0.3]))
    matrix, _ = moment_matching(moments, 0.01)
    assert torch.equal(matrix[0], torch.eye(4, dtype=torch.float64))
