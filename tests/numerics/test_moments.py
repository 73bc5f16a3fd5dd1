"""Streamed statistics against one pass over everything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from starquant.errors import DataError
from starquant.numerics import ChannelMoments, RowSample, SecondMoment, moments


def _rows(n: int = 500, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * torch.arange(1, d + 1)


def _chunks(x: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return list(x.split([*sizes, len(x) - sum(sizes)]))


def _moments(chunks: list[torch.Tensor]) -> ChannelMoments:
    moments = ChannelMoments()
    for chunk in chunks:
        moments.update(chunk)
    return moments


def test_channel_moments_equal_one_pass() -> None:
    x = _rows() + 3
    moments = _moments(_chunks(x, (1, 0, 17, 200)))
    assert moments.count == 500
    assert torch.allclose(moments.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(moments.variance, x.var(0, correction=0), rtol=1e-12)
    assert torch.allclose(moments.mean_abs, x.abs().mean(0), rtol=1e-12)
    assert torch.equal(moments.absmax, x.abs().amax(0))
    assert torch.allclose(moments.rms, x.square().mean(0).sqrt(), rtol=1e-12)


def test_a_large_mean_does_not_drown_a_small_variance() -> None:
    deviation = _rows(2000, 3) * 1e-2
    moments = _moments(_chunks(1e4 + deviation, (3, 700, 11)))
    assert torch.allclose(moments.variance, deviation.var(0, correction=0), rtol=1e-7)
    tiny = _moments(_chunks(1e8 + deviation, (3, 700, 11)))  # sum of squares less square of sums: off by more than 100%
    assert torch.allclose(tiny.variance, deviation.var(0, correction=0), rtol=1e-3)


def test_channel_moments_merge_as_if_seen_together() -> None:
    x = _rows() - 2
    a, b = _moments([x[:123]]), _moments([x[123:]])
    kept = b.mean.clone()
    a.merge(b)
    a.merge(ChannelMoments())
    whole = _moments([x])
    for name in ("mean", "variance", "mean_abs", "absmax", "rms"):
        assert torch.allclose(getattr(a, name), getattr(whole, name), rtol=1e-12), name
    assert a.count == whole.count
    empty = ChannelMoments()
    empty.merge(b)
    empty.update(x[:123])
    assert torch.allclose(empty.variance, whole.variance, rtol=1e-12)
    assert torch.equal(b.mean, kept)  # the merged one is left as it was


def test_half_types_are_accumulated_in_float64() -> None:
    x = _rows().bfloat16()
    moments = _moments([x])
    assert moments.mean.dtype == torch.float64
    assert torch.allclose(moments.mean, x.double().mean(0), rtol=1e-12)


def test_second_moment_equals_one_pass_with_and_without_weights() -> None:
    x, weight = _rows(), torch.rand(500, dtype=torch.float64) + 0.5
    plain, weighted = SecondMoment(), SecondMoment()
    for rows, w in zip(_chunks(x, (1, 0, 17)), _chunks(weight, (1, 0, 17)), strict=True):
        plain.update(rows)
        weighted.update(rows, w)
    assert plain.count == weighted.count == 500
    assert torch.allclose(plain.mean, torch.einsum("nd,ne->de", x, x) / 500, rtol=1e-12)
    # The weight multiplies x, and so counts twice.
    assert torch.allclose(weighted.mean, torch.einsum("n,nd,ne->de", weight.square(), x, x) / 500, rtol=1e-12)


def test_second_moments_merge_as_if_seen_together() -> None:
    x = _rows()
    a, b, whole = SecondMoment(), SecondMoment(), SecondMoment()
    a.update(x[:123])
    b.update(x[123:])
    whole.update(x)
    kept = b.mean.clone()
    empty = SecondMoment()
    empty.merge(b)
    empty.merge(a)
    a.merge(b)
    assert torch.allclose(a.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(empty.mean, whole.mean, rtol=1e-12)
    assert torch.equal(b.mean, kept)


@pytest.mark.parametrize(("channels", "exact"), [(1024, True), (1025, False)])
def test_products_of_float32_chunks(channels: int, exact: bool) -> None:
    x = torch.randn(40, channels, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment()
    moment.update(x)
    moment.update(x)
    expected = x.double().T @ x.double() / 40
    assert moment.mean.dtype == torch.float64
    assert torch.allclose(moment.mean, expected, rtol=0, atol=1e-12) == exact
    assert torch.allclose(moment.mean, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 15, 16, 17, 64, 1000])
def test_the_sample_does_not_depend_on_batches(size: int) -> None:
    x = torch.arange(1000.0)[:, None].expand(1000, 2)
    whole, parts = RowSample(50, seed=3), RowSample(50, seed=3)
    whole.update(x)
    for chunk in x.split(size):
        parts.update(chunk)
    assert torch.equal(whole.rows, parts.rows)
    assert parts.seen == 1000
    assert len(set(whole.rows[:, 0].tolist())) == 50
    assert bool((whole.rows[1:, 0] > whole.rows[:-1, 0]).all())  # order of arrival


def test_the_sample_is_uniform_and_seeded() -> None:
    x = torch.arange(200.0)[:, None]
    counts = torch.zeros(200)
    for seed in range(1500):
        sample = RowSample(20, seed)
        for chunk in x.split(64):
            sample.update(chunk)
        counts[sample.rows[:, 0].long()] += 1
    statistic = float(((counts - 150).square() / (150 * 0.9)).sum())  # chi^2 with 199 degrees of freedom
    assert 130 < statistic < 280
    a, b = RowSample(20, 0), RowSample(20, 1)
    a.update(x)
    b.update(x)
    assert not torch.equal(a.rows, b.rows)


def test_a_sample_of_few_rows_is_all_of_them_and_a_copy() -> None:
    x = torch.randn(5, 3, dtype=torch.bfloat16)
    sample = RowSample(8, seed=0)
    sample.update(x)
    kept = x.clone()
    x.zero_()
    assert torch.equal(sample.rows, kept)


def test_wide_second_moments_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What 8B models' down projections have; merged as others are, weighted as others are."""
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight = torch.linspace(0.5, 2.0, 300)
    exact = SecondMoment()
    exact.update(x.double(), weight)
    monkeypatch.setattr(moments, "_DOUBLE_SUMS", 8)
    monkeypatch.setattr(moments, "_DOUBLE_CHANNELS", 8)
    parts = [SecondMoment(), SecondMoment()]
    for i in range(0, 300, 50):
        parts[i // 150].update(x[i : i + 50], weight[i : i + 50])
    parts[0].merge(parts[1])
    assert parts[0].total.dtype == torch.float32
    assert parts[0].count == exact.count
    assert torch.allclose(parts[0].mean.double(), exact.mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 5, 6, 11, 12, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_of_a_symmetric_product_is_computed_and_all_of_it_read(
    block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read, added and merged in between, and of rows beside others, whose product is not symmetric."""
    monkeypatch.setattr(moments, "_BLOCK", {"cpu": block})
    monkeypatch.setattr(moments, "_DOUBLE_CHANNELS", 4)
    x, y = (torch.randn(90, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in (3, 4))
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    symmetric, beside, other = SecondMoment(), SecondMoment(), SecondMoment()
    for part in range(3):
        rows = slice(30 * part, 30 * part + 30)
        symmetric.update(x[rows])
        beside.update(x[rows], beside_ND=y[rows])
        expected = (x[: rows.stop].T @ x[: rows.stop]).double()
        torch.testing.assert_close(symmetric.total, expected, **near)
    torch.testing.assert_close(beside.total, (y.T @ x).double(), **near)
    other.update(x)
    other.merge(symmetric)
    beside.merge(symmetric)
    torch.testing.assert_close(other.total, 2 * (x.T @ x).double(), **near)
    torch.testing.assert_close(beside.total, (y.T @ x + x.T @ x).double(), **near)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_finite(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.full(shape, largest, dtype=dtype)
    x.flatten()[:1] = -largest
    assert moments.all_finite(x)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in {0, x.numel() // 2, x.numel() - 1} if x.numel() else ():
            worse = x.clone()
            worse.view(-1)[place] = bad
            assert not moments.all_finite(worse)


@pytest.mark.parametrize("make", [ChannelMoments, SecondMoment, lambda: RowSample(4, 0)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(make: Callable[[], RowSample], bad: float) -> None:
    x = torch.ones(4, 3)
    x[2, 1] = bad
    with pytest.raises(DataError, match="holds values that are not finite"):
        make().update(x)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="token weights: holds values that are not finite"):
        SecondMoment().update(torch.ones(2, 3), torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize(
    "read",
    [
        lambda: ChannelMoments().mean,
        lambda: ChannelMoments().rms,
        lambda: SecondMoment().mean,
        lambda: RowSample(4, 0).rows,
    ],
)
def test_nothing_seen_is_an_error_not_a_nan(read: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(DataError, match="no rows were seen"):
        read()
