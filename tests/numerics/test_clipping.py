"""Clip searches against exhaustive ones, one row at a time."""

from __future__ import annotations

import pytest
import torch

from starquant.errors import ConfigError, DataError
from starquant.numerics import PerChannel, PerGroup, QuantFormat, clipping, fake_quantize, mse_clip, output_clip

FORMATS = [
    QuantFormat(bits, symmetric, granularity)
    for bits in (2, 4)
    for symmetric in (True, False)
    for granularity in (PerChannel(), PerGroup(8))
]


def _weight(outputs: int = 12, inputs: int = 32) -> torch.Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    weight[::3, 5] *= 6.0
    weight[1] = 0.0
    return weight


def _hessian(inputs: int = 32, rows: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x / rows


def _runs(x: torch.Tensor, fmt: QuantFormat) -> torch.Tensor:
    return x.unflatten(1, (-1, fmt.granularity.size)) if isinstance(fmt.granularity, PerGroup) else x[:, None]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_mse_clip_is_the_best_ratio_of_every_run(fmt: QuantFormat, norm: float) -> None:
    weight = _weight()
    clip = mse_clip(weight, fmt, norm=norm, grid=20, max_shrink=0.8)
    runs = _runs(weight, fmt)
    assert clip.shape == ((12, 4, 1) if isinstance(fmt.granularity, PerGroup) else (12, 1))
    for run, found in zip(runs.flatten(0, 1), clip.flatten().tolist(), strict=True):
        errors = {}
        for i in range(16):  # the ratio goes in by the format, not by `clip`
            one = QuantFormat(fmt.bits, fmt.symmetric, PerChannel(), 1.0 - i / 20)
            errors[1.0 - i / 20] = float((fake_quantize(run[None], one) - run).abs().double().pow(norm).sum())
        best = min(errors.values())
        assert errors[min(errors, key=lambda r: abs(r - found))] == pytest.approx(best, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(
    "fmt", [*FORMATS, QuantFormat(8, True, PerChannel()), QuantFormat(4, True, PerGroup(64))], ids=str
)
@pytest.mark.parametrize("norm", [2.0, 2.4, 3.0])
def test_powers_that_are_left_out_change_nothing(
    fmt: QuantFormat, norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of many kinds: normal, with outliers, of zeros, of one number, heavy-tailed, tiny, huge."""
    monkeypatch.setattr(clipping, "PRUNED", 1)
    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(2))
    weight[::3, 5] *= 30.0
    weight[1], weight[2, 1:], weight[4] = 0.0, 0.0, 1.5
    weight[8:16] = weight[8:16].pow(5)
    weight[16:20] *= 1e-18
    weight[20:24] *= 1e12
    weight[24:28] = weight[24:28].round()
    expected = clipping._power_search(weight, fmt, norm, 100, 0.8)
    assert torch.equal(mse_clip(weight, fmt, norm=norm), expected)
    monkeypatch.setattr(clipping, "PRUNED", 10**9)
    assert torch.equal(mse_clip(weight, fmt, norm=norm), expected)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_mse_clip_is_never_worse_than_none_and_helps_with_outliers(fmt: QuantFormat) -> None:
    weight = _weight(64, 256)
    clip = mse_clip(weight, fmt)
    with_clip = _runs(fake_quantize(weight, fmt, clip=clip) - weight, fmt).abs().pow(2.4).sum(-1)
    without = _runs(fake_quantize(weight, fmt) - weight, fmt).abs().pow(2.4).sum(-1)
    assert bool((with_clip <= without).all())
    assert float(with_clip.sum()) < 0.95 * float(without.sum())
    assert float(clip.min()) >= 0.2
    assert bool((clip.reshape(64, -1)[1] == 1.0).all())  # a row of zeros: nothing gained


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_output_clip_is_the_best_ratio_of_every_run(fmt: QuantFormat) -> None:
    weight, hessian = _weight(), _hessian()
    clip = output_clip(weight, hessian, fmt)
    runs = _runs(weight, fmt)
    size = runs.shape[-1]
    for o in range(len(runs)):
        for g in range(runs.shape[1]):
            block = hessian[g * size : (g + 1) * size, g * size : (g + 1) * size]
            errors = {}
            for i in range(10):
                one = QuantFormat(fmt.bits, fmt.symmetric, PerChannel(), 1.0 - i / 20)
                delta = (fake_quantize(runs[o, g][None], one) - runs[o, g]).double()[0]
                errors[1.0 - i / 20] = float(delta @ block @ delta)
            found = float(clip.reshape(len(runs), -1)[o, g])
            assert errors[min(errors, key=lambda r: abs(r - found))] == pytest.approx(
                min(errors.values()), rel=1e-4, abs=1e-12
            )


def test_output_clip_does_not_depend_on_the_scale_of_h() -> None:
    fmt = QuantFormat(3, True, PerChannel())
    clip = output_clip(_weight(), _hessian(), fmt)
    assert float(clip.min()) < 1.0
    for scale in (1e-30, 3.7, 1e20):
        assert torch.equal(clip, output_clip(_weight(), _hessian() * scale, fmt))


def test_output_clip_with_identity_is_mse_clip() -> None:
    for fmt in FORMATS:
        expected = mse_clip(_weight(), fmt, norm=2.0, grid=20, max_shrink=0.5)
        assert torch.equal(output_clip(_weight(), torch.eye(32), fmt), expected)


def test_the_ratios_multiply_those_of_the_format() -> None:
    weight = _weight()[:1]
    tight = QuantFormat(4, True, PerChannel(), 0.6)
    clip = mse_clip(weight, tight, norm=2.0)
    combined = QuantFormat(4, True, PerChannel(), 0.6 * float(clip))
    assert torch.allclose(fake_quantize(weight, tight, clip=clip), fake_quantize(weight, combined), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: mse_clip(w, QuantFormat(16, True, PerChannel())), ConfigError, "full precision"),
        (lambda w: mse_clip(w, FORMATS[0], grid=0), ConfigError, "grid: got 0"),
        (lambda w: mse_clip(w, FORMATS[0], max_shrink=1.5), ConfigError, "max_shrink: got 1.5"),
        (lambda w: mse_clip(w / 0.0, FORMATS[0]), DataError, "weight: holds values that are not finite"),
        (lambda w: output_clip(w, torch.eye(31), FORMATS[0]), DataError, r"hessian: got shape \[31, 31\]"),
        (lambda w: output_clip(w, torch.eye(32) / 0.0, FORMATS[0]), DataError, "hessian: holds values"),
        (
            lambda w: output_clip(w, torch.eye(32), QuantFormat(4, True, PerGroup(5))),
            ConfigError,
            "group_size: got 5",
        ),
    ],
)
def test_bad_input_is_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(_weight())
