"""GPTQ against optimal brain quantization done slowly: a fresh inverse at every column, in float64."""

from __future__ import annotations

import pytest
import torch

from starquant.errors import ConfigError, DataError
from starquant.numerics import PerChannel, PerGroup, QuantFormat, dequantize, gptq, quantize
from starquant.numerics.chunks import CHUNK
from starquant.numerics.gptq import factorize
from tests.support.memory import peak_bytes

FORMATS = [
    QuantFormat(bits, symmetric, granularity)
    for bits in (2, 4)
    for symmetric in (True, False)
    for granularity in (PerChannel(), PerGroup(8))
]
W4 = QuantFormat(4, True, PerChannel())


def _weight(outputs: int = 10, inputs: int = 48) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def _hessian(inputs: int = 48, rows: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    mix += 3 * torch.randn(inputs, 1, generator=generator, dtype=torch.float64)  # correlated inputs
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x / rows


def _grid(run: torch.Tensor, fmt: QuantFormat, clip: float) -> tuple[float, int, int, int]:
    if fmt.symmetric:
        half = 2 ** (fmt.bits - 1)
        return clip * float(run.abs().max()) / (half - 1), 0, -half, half - 1
    low, high = clip * min(0.0, float(run.min())), clip * max(0.0, float(run.max()))
    scale = (high - low) / (2**fmt.bits - 1)
    return scale, round(-low / scale), 0, 2**fmt.bits - 1


def _slow(
    weight: torch.Tensor, hessian: torch.Tensor, fmt: QuantFormat, percdamp: float, act_order: bool, clip: torch.Tensor
) -> torch.Tensor:
    """Return codes [O, I]: round a column, move the remaining ones by the exact optimum, invert what remains again."""
    outputs, inputs = weight.shape
    live = hessian.diagonal() > 0
    h = hessian.double().clone()
    mean = h.diagonal()[live].mean()
    h[~live, ~live] = mean
    h += percdamp * mean * torch.eye(inputs, dtype=torch.float64)
    left = sorted(range(inputs), key=lambda j: -float(h[j, j])) if act_order else list(range(inputs))
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else inputs
    ratios = clip.reshape(outputs, -1)
    w, codes = weight.double().clone(), torch.zeros(outputs, inputs, dtype=torch.int64)
    w[:, ~live] = 0.0
    while left:
        j = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        for o in range(outputs):
            g = j // size
            run = weight[o, g * size : (g + 1) * size].double()
            scale, zero, low, high = _grid(run, fmt, float(ratios[o, g]))
            codes[o, j] = min(max(round(float(w[o, j]) / scale) + zero, low), high)
            error = float(w[o, j]) - scale * (int(codes[o, j]) - zero)
            w[o, left] -= error / inverse[0, 0] * inverse[0]
        left = left[1:]
    return codes


def _loss(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    delta = (values - weight).double()
    return float((delta @ hessian * delta).sum())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_equal_slow_optimal_brain_quantization(fmt: QuantFormat, act_order: bool) -> None:
    weight, hessian = _weight(), _hessian()
    hessian[7], hessian[:, 7] = 0.0, 0.0
    shape = (10, 6, 1) if isinstance(fmt.granularity, PerGroup) else (10, 1)
    clip = 0.6 + 0.4 * torch.rand(shape, generator=torch.Generator().manual_seed(2))
    result = gptq(weight, hessian, fmt, act_order=act_order, block_size=16, clip=clip)
    expected = _slow(weight, hessian, fmt, 0.01, act_order, clip)
    assert torch.equal(result.quantized.codes.reshape(10, 48).long(), expected)
    assert not torch.equal(quantize(weight, fmt, clip=clip).codes.reshape(10, 48).long(), expected)
    assert result.dead == 1
    assert result.damping == 0.01


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_layout_and_grid_are_those_of_quantize(fmt: QuantFormat, act_order: bool) -> None:
    weight, hessian = _weight(), _hessian()
    solved, nearest = gptq(weight, hessian, fmt, act_order=act_order).quantized, quantize(weight, fmt)
    assert solved.codes.shape == nearest.codes.shape
    assert solved.codes.dtype == nearest.codes.dtype
    assert (solved.shape, solved.qmin) == (nearest.shape, nearest.qmin)
    assert torch.equal(solved.scale, nearest.scale)
    assert (solved.zero is None) == (nearest.zero is None)
    if solved.zero is not None:
        assert torch.equal(solved.zero, nearest.zero)
    assert _loss(weight, dequantize(solved), hessian) < 0.6 * _loss(weight, dequantize(nearest), hessian)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_identity_is_rounding_to_nearest(fmt: QuantFormat, act_order: bool) -> None:
    weight = _weight(32, 256)
    result = gptq(weight, 0.3 * torch.eye(256), fmt, act_order=act_order)
    assert torch.equal(result.quantized.codes, quantize(weight, fmt).codes)
    assert torch.equal(dequantize(result.quantized), dequantize(quantize(weight, fmt)))


@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_does_not_matter(act_order: bool) -> None:
    weight, hessian, fmt = _weight(), _hessian(), QuantFormat(4, False, PerGroup(8))
    codes = [
        gptq(weight, hessian, fmt, act_order=act_order, block_size=size).quantized.codes for size in (1, 5, 16, 48, 128)
    ]
    assert all(torch.equal(c, codes[0]) for c in codes)


@pytest.mark.parametrize("scale", [1e-30, 3.7, 1e25])
def test_the_scale_of_h_does_not_matter(scale: float) -> None:
    weight, hessian = _weight(), _hessian()
    hessian[7], hessian[:, 7] = 0.0, 0.0
    expected = gptq(weight, hessian, W4, act_order=True)
    got = gptq(weight, hessian * scale, W4, act_order=True)
    assert torch.equal(got.quantized.codes, expected.quantized.codes)
    assert got.damping == expected.damping


def test_dead_inputs_are_zeroed_and_move_nothing() -> None:
    weight, hessian = _weight(), _hessian()
    dead = [0, 7, 47]
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    result = gptq(weight, hessian, QuantFormat(4, False, PerChannel()))
    values = dequantize(result.quantized)
    assert result.dead == 3
    assert bool((values[:, dead] == 0).all())
    weight[:, dead] = 0.1  # inside the range, so the grid does not change with it
    changed = weight.clone()
    changed[:, dead] = -0.2
    assert torch.equal(gptq(changed, hessian, W4).quantized.codes, gptq(weight, hessian, W4).quantized.codes)
    everything = gptq(weight, torch.zeros(48, 48), W4)
    assert everything.dead == 48
    assert bool((dequantize(everything.quantized) == 0).all())


def test_rank_deficient_second_moments_work_at_the_usual_damping() -> None:
    weight, hessian = _weight(), _hessian(rows=5)
    assert int(torch.linalg.matrix_rank(hessian)) == 5
    result = gptq(weight, hessian, W4)
    assert result.damping == 0.01
    nearest = dequantize(quantize(weight, W4))
    assert _loss(weight, dequantize(result.quantized), hessian) < 0.1 * _loss(weight, nearest, hessian)


@pytest.mark.parametrize("percdamp", [0.0, 1e-18])
def test_a_singular_h_raises_the_damping(percdamp: float) -> None:
    weight, hessian = _weight(), _hessian(rows=5)
    result = gptq(weight, hessian, W4, percdamp=percdamp)
    assert 1e-15 < result.damping <= 1e-5
    assert torch.equal(result.quantized.codes, gptq(weight, hessian, W4, percdamp=result.damping).quantized.codes)


def test_damping_rises_tenfold_and_ends_at_the_mean_diagonal() -> None:
    eye = torch.eye(48, dtype=torch.float64)
    direction = torch.ones(48, dtype=torch.float64)[:, None] / 48**0.5
    slightly = eye - 1.05 * direction @ direction.T  # smallest eigenvalue -0.05, mean diagonal about 0.98
    assert gptq(_weight(), slightly, W4, percdamp=0.001).damping == pytest.approx(0.1)
    hopeless = eye - 20.0 * direction @ direction.T
    with pytest.raises(DataError, match="not positive definite"):
        gptq(_weight(), hopeless, W4, percdamp=0.001)


def test_many_inputs_are_solved_in_float32() -> None:
    weight, hessian = _weight(4, 2056), torch.eye(2056)
    hessian += 0.5
    solved = dequantize(gptq(weight, hessian, W4).quantized)
    assert _loss(weight, solved, hessian.double()) < _loss(weight, dequantize(quantize(weight, W4)), hessian.double())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("inputs", [48, 700])
def test_a_factor_times_its_transpose_is_the_damped_moment(inputs: int, act_order: bool) -> None:
    rows = torch.randn(2 * inputs, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    hessian = rows.T @ rows
    factor = factorize(hessian, percdamp=0.05, act_order=act_order)
    order = torch.arange(inputs) if factor.order_I is None else factor.order_I
    damped = (hessian / hessian.diagonal().mean())[order][:, order] + 0.05 * torch.eye(inputs, dtype=torch.float64)
    assert torch.allclose(factor.upper_II @ factor.upper_II.T, damped, rtol=1e-9, atol=1e-10)
    assert torch.equal(factor.upper_II, factor.upper_II.triu())
    assert (factor.order_I is None) != act_order


def test_linears_of_one_input_share_a_factor() -> None:
    weight, hessian = _weight(), _hessian()
    factor = factorize(hessian, percdamp=0.02, act_order=True)
    for one in (weight, -2.0 * weight):
        alone = gptq(one, hessian, W4, percdamp=0.02, act_order=True)
        assert torch.equal(gptq(one, factor, W4).quantized.codes, alone.quantized.codes)


def test_a_factor_takes_two_matrices_beside_h() -> None:
    hessian = torch.eye(6000) + 0.01
    assert peak_bytes(lambda: factorize(hessian)) < 2.3 * hessian.numel() * 4 + 3 * 8 * CHUNK


def test_inputs_are_left_as_they_were() -> None:
    weight, hessian = _weight(), _hessian()
    kept = weight.clone(), hessian.clone()
    gptq(weight, hessian, W4, act_order=True)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w, h: gptq(w, h, QuantFormat(16, True, PerChannel())), ConfigError, "full precision"),
        (lambda w, h: gptq(w, h, QuantFormat(4, True, PerGroup(5))), ConfigError, "group_size: got 5"),
        (lambda w, h: gptq(w, h, W4, percdamp=-1.0), ConfigError, "percdamp: got -1.0"),
        (lambda w, h: gptq(w, h, W4, block_size=0), ConfigError, "block_size: got 0"),
        (lambda w, h: gptq(w / 0.0, h, W4), DataError, "weight: holds values that are not finite"),
        (lambda w, h: gptq(w, h * float("nan"), W4), DataError, "hessian: holds values that are not finite"),
        (lambda w, h: gptq(w, h[1:, 1:], W4), DataError, r"hessian: got 47 inputs, needed: 48"),
        (lambda w, h: factorize(h[1:]), DataError, r"hessian: got shape \[47, 48\], needed: a square"),
        (lambda w, h: gptq(w, -h, W4), DataError, "hessian: has negative numbers"),
    ],
)
def test_bad_input_is_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(_weight(), _hessian())
