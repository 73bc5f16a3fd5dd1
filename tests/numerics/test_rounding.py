"""Uniform quantization against a scalar implementation, identities and floors."""

from __future__ import annotations

import math

import pytest
import torch

from starquant.errors import CheckpointError, ConfigError
from starquant.numerics import (
    PerChannel,
    PerGroup,
    PerToken,
    QuantFormat,
    Quantized,
    SqnrMeter,
    dequantize,
    fake_quantize,
    quantize,
    sqnr_db,
)

FORMATS = [
    QuantFormat(bits, symmetric, granularity, clip)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for granularity in (PerToken(), PerChannel(), PerGroup(4))
    for clip in (1.0, 0.8)
]


def _scalar(row: list[float], fmt: QuantFormat) -> list[float]:
    """Quantize one run of numbers that share a scale, one number at a time."""
    if fmt.symmetric:
        scale = max(abs(x) for x in row) * fmt.clip_ratio / (2 ** (fmt.bits - 1) - 1)
        low, high, zero = -(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1, 0
    else:
        bottom, top = min(0.0, *row) * fmt.clip_ratio, max(0.0, *row) * fmt.clip_ratio
        scale, low, high = (top - bottom) / (2**fmt.bits - 1), 0, 2**fmt.bits - 1
        zero = round(-bottom / scale) if scale else 0
    if scale == 0:
        return [0.0] * len(row)
    return [scale * (min(max(round(x / scale) + zero, low), high) - zero) for x in row]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_against_scalar_arithmetic(fmt: QuantFormat) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 0.0  # a row of zeros
    x[1, 1] = x[1, 1].abs()  # one sign only
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else 8
    runs = x.reshape(-1, size).tolist()
    expected = torch.tensor([_scalar(run, fmt) for run in runs]).reshape(x.shape)
    assert torch.allclose(fake_quantize(x, fmt), expected, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_fake_equals_codes_and_back(fmt: QuantFormat) -> None:
    x = torch.randn(6, 16)
    q = quantize(x, fmt)
    assert int(q.codes.min()) >= fmt.qmin
    assert int(q.codes.max()) <= fmt.qmax
    assert torch.equal(dequantize(q), fake_quantize(x, fmt))


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_number_is_better_off_damped_on_the_same_grid(fmt: QuantFormat, strength: float) -> None:
    """What a gate leaves of a channel, all or a part, goes to some grid point; x itself goes to the nearest."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 1, 16)
    q = quantize(x, fmt)
    runs = x.reshape(q.codes.shape)
    zero = 0.0 if q.zero is None else q.zero
    codes = (torch.round(runs * strength / q.scale) + zero).clamp(fmt.qmin, fmt.qmax)
    damped = ((codes - zero) * q.scale).reshape(x.shape)
    assert bool(((x - dequantize(q)).abs() <= (x - damped).abs() * (1 + 1e-4) + 1e-7).all())
    assert bool((damped != dequantize(q)).any())


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.clip_ratio == 1.0], ids=str)
def test_grid_points_are_fixed_and_zero_is_exact(fmt: QuantFormat) -> None:
    once = fake_quantize(torch.randn(6, 16), fmt)
    assert torch.allclose(fake_quantize(once, fmt), once, atol=1e-5)
    x = torch.randn(4, 8)
    x[:, 3] = 0.0
    assert bool((fake_quantize(x, fmt)[:, 3] == 0).all())


@pytest.mark.parametrize(("bits", "floor"), [(8, 38.0), (4, 14.0), (3, 7.0)])
def test_sqnr_floors_on_gaussians(bits: int, floor: float) -> None:
    x = torch.randn(64, 1024)
    value = sqnr_db(x, fake_quantize(x, QuantFormat(bits, True, PerToken())))
    assert value is not None
    assert floor < value < floor + 8.0


def test_outliers_cost_what_they_should_and_groups_contain_them() -> None:
    x = torch.randn(64, 1024)
    x[:, 7] *= 60.0
    per_token = fake_quantize(x, QuantFormat(4, True, PerToken()))
    grouped = fake_quantize(x, QuantFormat(4, True, PerGroup(64)))
    rest = [i for i in range(1024) if i != 7]
    assert sqnr_db(x[:, rest], per_token[:, rest]) < 2.0  # everything else is rounded away
    assert sqnr_db(x[:, rest], grouped[:, rest]) > 12.0


def test_error_is_at_most_half_a_step() -> None:
    x = torch.randn(16, 64)
    fmt = QuantFormat(4, True, PerToken())
    step = x.abs().amax(-1, keepdim=True) / 7
    assert bool(((x - fake_quantize(x, fmt)).abs() <= step / 2 + 1e-6).all())


def test_16_bits_return_the_tensor_itself() -> None:
    x = torch.randn(3, 4)
    assert fake_quantize(x, QuantFormat(16, True, PerToken())) is x
    with pytest.raises(ConfigError, match="full precision"):
        quantize(x, QuantFormat(16, True, PerToken()))


def test_dtype_is_kept_and_input_unchanged() -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    before = x.clone()
    assert fake_quantize(x, QuantFormat(4, False, PerToken())).dtype == torch.bfloat16
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantFormat(1, True, PerToken()), "bits: got 1"),
        (lambda: QuantFormat(9, True, PerToken()), "bits: got 9"),
        (lambda: QuantFormat(4, True, PerToken(), 0.0), "clip_ratio: got 0.0"),
        (lambda: fake_quantize(torch.randn(2, 10), QuantFormat(4, True, PerGroup(4))), "group_size: got 4"),
    ],
)
def test_bad_formats_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_sqnr_is_ten_log_ten_and_streams() -> None:
    x, y = torch.randn(2, 50, 8), torch.randn(2, 50, 8)
    meter = SqnrMeter()
    for a, b in zip(x, y, strict=True):
        meter.update(a, b)
    expected = 10 * math.log10(float(x.double().square().sum() / (x.double() - y.double()).square().sum()))
    assert meter.value() == pytest.approx(expected, rel=1e-9)
    assert sqnr_db(x, x) is None


def _clip_shape(fmt: QuantFormat) -> tuple[int, ...]:
    return (6, 4, 1) if isinstance(fmt.granularity, PerGroup) else (6, 1)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_clip_of_one_is_none_and_a_constant_is_the_format_s(fmt: QuantFormat) -> None:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fake_quantize(x, fmt, clip=torch.ones(_clip_shape(fmt))), fake_quantize(x, fmt))
    half = torch.full(_clip_shape(fmt), 0.5)  # a power of two: exact either way
    tighter = QuantFormat(fmt.bits, fmt.symmetric, fmt.granularity, fmt.clip_ratio * 0.5)
    assert torch.equal(fake_quantize(x, fmt, clip=half), fake_quantize(x, tighter))
    assert torch.equal(dequantize(quantize(x, fmt, clip=half)), fake_quantize(x, fmt, clip=half))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_clip_is_each_run_s_own(fmt: QuantFormat) -> None:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    clip = torch.rand(_clip_shape(fmt), generator=torch.Generator().manual_seed(4)) * 0.7 + 0.3
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else 16
    expected = [
        _scalar(run, QuantFormat(fmt.bits, fmt.symmetric, fmt.granularity, fmt.clip_ratio * ratio))
        for run, ratio in zip(x.reshape(-1, size).tolist(), clip.flatten().tolist(), strict=True)
    ]
    assert torch.allclose(fake_quantize(x, fmt, clip=clip), torch.tensor(expected).reshape(x.shape), atol=1e-5)
    assert torch.equal(dequantize(quantize(x, fmt, clip=clip)), fake_quantize(x, fmt, clip=clip))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_survive_a_file(fmt: QuantFormat) -> None:
    x = torch.randn(6, 16)
    q = quantize(x, fmt)
    tensors = q.to_tensors("layer.weight")
    assert set(tensors) == {
        f"layer.weight.{name}" for name in ("codes", "scale", *(() if fmt.symmetric else ("zero",)))
    }
    codes = tensors["layer.weight.codes"]
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**fmt.bits
    assert all(t.is_contiguous() for t in tensors.values())
    back = Quantized.from_tensors(tensors, "layer.weight", fmt, x.shape)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(dequantize(back), dequantize(q))
    assert (back.shape, back.qmin) == (q.shape, q.qmin)


def test_codes_that_do_not_fit_are_named() -> None:
    fmt = QuantFormat(4, False, PerChannel())
    tensors = quantize(torch.randn(4, 8), fmt).to_tensors("w")
    with pytest.raises(CheckpointError, match=r"w\.zero: missing"):
        Quantized.from_tensors({k: v for k, v in tensors.items() if k != "w.zero"}, "w", fmt, (4, 8))
    with pytest.raises(CheckpointError, match=r"w\.codes: got \[4, 8\], needed: codes of \[4, 9\]"):
        Quantized.from_tensors(tensors, "w", fmt, (4, 9))
    with pytest.raises(CheckpointError, match=r"w\.codes: got 15, allowed: 0 to 7"):
        Quantized.from_tensors(tensors, "w", QuantFormat(3, False, PerChannel()), (4, 8))


@pytest.mark.parametrize("ends", [1, 2])
@pytest.mark.parametrize("block", ["q8_0", None])
def test_a_ratio_of_a_row_is_that_of_all_of_its_groups(ends: int, block: str | None) -> None:
    """Clip ratios of token states on inputs in blocks; as many rows as groups would fit the wrong axis too."""
    fmt = QuantFormat(8, True, PerGroup(32), block=block)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 256, generator=generator)
    clip = 0.5 + torch.rand(8, ends, generator=generator) / 2
    rows = [fake_quantize(x[row : row + 1], fmt, clip=clip[row].expand(1, 8, ends)) for row in range(8)]
    assert torch.equal(fake_quantize(x, fmt, clip=clip), torch.cat(rows))
    several = fake_quantize(x.expand(3, 8, 256), fmt, clip=clip.expand(3, 8, ends))
    assert torch.equal(several[1], torch.cat(rows))
