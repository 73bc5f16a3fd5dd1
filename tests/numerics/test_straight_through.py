"""Straight-through rounding: the values of `fake_quantize`, gradients derived by hand and by slow differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from starquant.errors import ConfigError
from starquant.numerics import PerChannel, PerGroup, PerToken, QuantFormat, fake_quantize, straight_through

FORMATS = [
    QuantFormat(bits, symmetric, granularity, clip)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for granularity in (PerToken(), PerGroup(4))
    for clip in (1.0, 0.8)
]
FOUR = QuantFormat(4, True, PerToken())  # largest code 7
UNSIGNED = QuantFormat(2, False, PerToken())  # codes 0 to 3


def _clip(fmt: QuantFormat, rows: int = 6, ends: int = 1) -> torch.Tensor:
    """Clip ratios of every run: one, or one of the largest and one of the smallest number."""
    shape = (rows, 4, ends) if isinstance(fmt.granularity, PerGroup) else (rows, ends)
    return 0.3 + 0.7 * torch.rand(shape, generator=torch.Generator().manual_seed(4))


def _gradients(
    x: torch.Tensor, fmt: QuantFormat, weight: torch.Tensor, clip: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = x.clone().requires_grad_()
    clip = None if clip is None else clip.clone().requires_grad_()
    (straight_through(x, fmt, clip) * weight).sum().backward()
    assert x.grad is not None
    return x.grad, None if clip is None else clip.grad


@pytest.mark.parametrize("ends", [0, 1, 2])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_values_are_those_of_fake_quantize(fmt: QuantFormat, ends: int) -> None:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    x[0], x[1], x[2] = 0.0, x[1].abs(), -x[2].abs()
    clip = _clip(fmt, ends=ends) if ends else None
    assert torch.allclose(straight_through(x, fmt, clip), fake_quantize(x, fmt, clip=clip), atol=1e-6)


def test_values_of_a_weight_and_of_half_types_are_float32() -> None:
    x = torch.randn(6, 16).bfloat16()
    fmt = QuantFormat(4, True, PerChannel())
    got = straight_through(x, fmt)
    assert got.dtype == torch.float32
    assert torch.allclose(got, fake_quantize(x.float(), fmt), atol=1e-6)


def test_ties_of_half_types_are_broken_as_fake_quantize_breaks_them() -> None:
    """In bfloat16 x / scale is often exactly a half: codes differ by one wherever the scale is off by one ulp."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.allclose(straight_through(x, FOUR), fake_quantize(x.float(), FOUR), atol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_symmetric_gradient_by_hand(sign: float) -> None:
    """Scale 1: each number passes its gradient, and the largest also moves the scale under all rounding errors."""
    x, weight = sign * torch.tensor([7.0, 2.3, -3.6, 0.4]), torch.tensor([1.0, 10.0, 100.0, 1000.0])
    through_scale = 10 * (2 - 2.3) + 100 * (-4 + 3.6) + 1000 * (0 - 0.4)
    grad, _ = _gradients(x, FOUR, weight)
    assert torch.allclose(grad, torch.tensor([1.0 + through_scale / 7, 10.0, 100.0, 1000.0]), rtol=1e-4)


def test_clipped_symmetric_gradient_by_hand() -> None:
    """Clip 0.5 of 7: scale 0.5; 7, 5 and -6 fall outside, onto codes 7, 7 and -8."""
    x, weight = torch.tensor([7.0, 5.0, -6.0, 1.7]), torch.tensor([1.0, 10.0, 100.0, 1000.0])
    of_scale = 1 * 7 + 10 * 7 + 100 * -8 + 1000 * (3 - 3.4)
    grad, of_clip = _gradients(x, FOUR, weight, torch.tensor([0.5]))
    assert torch.allclose(grad, torch.tensor([of_scale * 0.5 / 7, 0.0, 0.0, 1000.0]), rtol=1e-4)
    assert of_clip is not None
    assert of_clip.item() == pytest.approx(of_scale * 1.0, rel=1e-4)  # scale = clip x 7 / 7
    in_format = QuantFormat(4, True, PerToken(), 0.5)
    assert torch.allclose(_gradients(x, in_format, weight)[0], grad, rtol=1e-5)


def test_asymmetric_gradient_by_hand() -> None:
    """-1.1 to 1.9, scale 1, zero point 1 (exact 1.1), nothing outside: codes 0, 1, 2, 3 stand for -1, 0, 1, 2."""
    x, weight = torch.tensor([-1.1, 0.3, 0.8, 1.9]), torch.tensor([1.0, 10.0, 100.0, 1000.0])
    of_scale = 1 * (-1 + 1.1) + 10 * (0 - 0.3) + 100 * (1 - 0.8) + 1000 * (2 - 1.9)
    grad, _ = _gradients(x, UNSIGNED, weight)
    expected = torch.tensor([1.0 - of_scale / 3, 10.0, 100.0, 1000.0 + of_scale / 3])
    assert torch.allclose(grad, expected, rtol=1e-4)


def _surrogate(x: torch.Tensor, fmt: QuantFormat, clip: torch.Tensor) -> Callable[..., float]:
    """A float64 sum, one number at a time, where rounding errors and codes off the grid stay those at (x, clip)."""
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else x.shape[-1]

    def runs(t: torch.Tensor) -> list[list[float]]:
        found: list[list[float]] = t.double().reshape(-1, size).tolist()
        return found

    def grid(run: list[float], ratios: list[float]) -> tuple[float, float]:
        low, high = min(0.0, *run) * ratios[-1] * fmt.clip_ratio, max(0.0, *run) * ratios[0] * fmt.clip_ratio
        if fmt.symmetric:
            return max(high, -low) / fmt.qmax, 0.0
        return (high - low) / fmt.qmax, -low * fmt.qmax / (high - low)

    frozen = []
    for run, ratios in zip(runs(x), clip.flatten(0, -2).tolist(), strict=True):
        scale, zero = grid(run, ratios)
        codes = [round(v / scale) + round(zero) for v in run]
        errors = [round(v / scale) - v / scale for v in run]
        frozen.append((codes, errors, round(zero) - zero))

    def total(x: torch.Tensor, clip: torch.Tensor, weight: torch.Tensor) -> float:
        value = 0.0
        for run, ratios, (codes, errors, of_zero), gains in zip(
            runs(x), clip.flatten(0, -2).tolist(), frozen, runs(weight), strict=True
        ):
            scale, zero = grid(run, ratios)
            zero += of_zero
            for v, code, error, gain in zip(run, codes, errors, gains, strict=True):
                inside = fmt.qmin <= code <= fmt.qmax
                now = v / scale + error + zero if inside else min(max(code, fmt.qmin), fmt.qmax)
                value += gain * scale * (now - zero)
        return value

    return total


@pytest.mark.parametrize("ends", [1, 2])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_gradients_are_those_with_rounding_errors_held(fmt: QuantFormat, ends: int) -> None:
    generator = torch.Generator().manual_seed(7)
    x, weight = torch.randn(2, 2, 16, generator=generator)
    clip = _clip(fmt, 2, ends)
    total = _surrogate(x, fmt, clip)
    got_x, got_clip = _gradients(x, fmt, weight, clip)
    assert got_clip is not None
    for which, got in enumerate((got_x, got_clip)):
        slopes = []
        for index in range(got.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [x.double(), clip.double()]
                moved[which].view(-1)[index] += step
                ends.append(total(*moved, weight))
            slopes.append((ends[0] - ends[1]) / 2e-6)
        assert torch.allclose(got, torch.tensor(slopes).view_as(got), rtol=1e-3, atol=1e-4), which


def test_one_pair_of_ratios_for_all_rows() -> None:
    """Both rows are led by their upper end: 8 x .5 and 6 x .5 are above 7 x .25."""
    x, clip = torch.tensor([[8.0, -7.0, 1.0], [6.0, -7.0, 1.0]]), torch.tensor([0.5, 0.25], requires_grad=True)
    out = straight_through(x, FOUR, clip)
    torch.testing.assert_close(out, fake_quantize(x, FOUR, clip=clip.detach()))
    assert out[0].tolist() == pytest.approx([4.0, -8 * 4 / 7, 2 * 4 / 7])
    out.sum().backward()
    assert clip.grad is not None
    codes = torch.tensor([7.0 - 8 + 2, 7.0 - 8 + 2])
    inside = torch.tensor([1 / (4 / 7), 1 / (3 / 7)])  # x / s of the one number that is not cut
    assert clip.grad.tolist() == pytest.approx([float(((codes - inside) * torch.tensor([8.0, 6.0]) / 7).sum()), 0.0])


def test_gradient_of_clip_is_the_true_one_where_everything_is_cut() -> None:
    """Codes do not change then: `fake_quantize` itself is linear in the clip."""
    x, weight = torch.tensor([[4.0, -4.0, 3.0], [2.0, 1.5, -1.9]]), torch.tensor([1.0, 2.0, 4.0])
    clip = torch.tensor([[0.25], [0.5]])
    _, got = _gradients(x, FOUR, weight, clip)
    assert got is not None
    low, high = ((fake_quantize(x, FOUR, clip=clip + d) * weight).sum(1, keepdim=True) for d in (-0.0625, 0.0625))
    assert torch.allclose(got, (high - low) / 0.125, rtol=1e-4)
    assert torch.allclose(got, torch.tensor([[4 - 2 * 4 * 8 / 7 + 4 * 4], [2 + 2 * 2 - 4 * 2 * 8 / 7]]), rtol=1e-4)


def test_groups_do_not_see_each_other() -> None:
    x, fmt = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)), QuantFormat(3, True, PerGroup(4))
    weight = torch.zeros(3, 8)
    weight[1, 4:] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    clip = torch.full((3, 2, 1), 0.7)
    grad, of_clip = _gradients(x, fmt, weight, clip)
    assert of_clip is not None
    inside = torch.zeros(3, 8, dtype=torch.bool)
    inside[1, 4:] = True
    assert bool((grad[~inside] == 0).all())
    assert bool((grad[inside] != 0).any())
    assert of_clip.flatten().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_of_zeros_stays_zero_with_finite_gradients(symmetric: bool) -> None:
    fmt = QuantFormat(4, symmetric, PerToken())
    x = torch.zeros(2, 4, requires_grad=True)
    clip = torch.ones(2, 1, requires_grad=True)
    out = straight_through(x, fmt, clip)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4))
    assert x.grad is not None
    assert clip.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert clip.grad.tolist() == [[0.0], [0.0]]


def test_descent_on_the_clip_finds_the_one_that_was_planted() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(3)).clamp(-3, 3)
    wanted = fake_quantize(x, FOUR, clip=torch.tensor([0.6]))
    clip = torch.tensor([0.65], requires_grad=True)
    for _ in range(300):
        (grad,) = torch.autograd.grad((straight_through(x, FOUR, clip) - wanted).square().mean(), clip)
        with torch.no_grad():
            clip -= 0.02 * grad
    assert clip.item() == pytest.approx(0.6, abs=0.005)


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (QuantFormat(16, True, PerToken()), "bits: 16 means full precision"),
        (QuantFormat(4, True, PerGroup(4)), "group_size: got 4"),
    ],
)
def test_bad_formats_are_named(fmt: QuantFormat, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        straight_through(torch.randn(2, 10), fmt)
