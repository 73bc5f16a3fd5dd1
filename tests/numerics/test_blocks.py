"""Blocks of llama.cpp against the `gguf` package's own quantizer, a different implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from starquant.config import bits as bits_config
from starquant.errors import ConfigError
from starquant.numerics import (
    PerChannel,
    PerGroup,
    QuantFormat,
    dequantize,
    fake_quantize,
    formats,
    gptq,
    mse_clip,
    quantize,
    straight_through,
)

gguf = pytest.importorskip("gguf")

Q4_0 = QuantFormat(4, True, PerGroup(32), block="q4_0")
Q8_0 = QuantFormat(8, True, PerGroup(32), block="q8_0")


def _numbers() -> torch.Tensor:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    x[3, :32] = 0.0
    x[4, 32:64] = 1e-9  # a scale below every float16
    return x


def _theirs(x: torch.Tensor, kind: str) -> torch.Tensor:
    quant = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(x.numpy(), quant), quant))


def test_q8_0_gives_llama_cpps_numbers() -> None:
    x = _numbers()
    assert torch.equal(fake_quantize(x, Q8_0), _theirs(x, "Q8_0"))


def test_q4_0_has_llama_cpps_scales_and_never_errs_more() -> None:
    x = _numbers()
    raw = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q4_0).reshape(64, 3, 18)
    scale = torch.from_numpy(raw[..., :2].copy().view(np.float16).astype(np.float32))
    ours = quantize(x, Q4_0)
    assert torch.equal(ours.scale[scale != 0], scale[scale != 0])
    assert bool(((dequantize(ours) - x).abs() <= (_theirs(x, "Q4_0") - x).abs() + 2.0**-25).all())
    assert int(ours.codes.min()) == -8
    assert bool((ours.scale < 0).any() and (ours.scale > 0).any())


@pytest.mark.parametrize("fmt", [Q4_0, Q8_0], ids=["q4_0", "q8_0"])
def test_every_way_of_rounding_gives_the_same_numbers(fmt: QuantFormat) -> None:
    x = _numbers()
    clip = mse_clip(x, fmt) if fmt is Q4_0 else None
    expected = dequantize(quantize(x, fmt, clip=clip))
    assert torch.equal(fake_quantize(x, fmt, clip=clip), expected)
    assert torch.equal(straight_through(x, fmt, clip), expected)
    plain = gptq(x, torch.eye(96), fmt, clip=clip).quantized  # nothing to make up for: rounding to nearest
    off = (plain.codes - quantize(x, fmt, clip=clip).codes)[32:].abs()  # the others' scales are coarse in float16
    assert int(off.max()) <= 1
    assert float((off > 0).double().mean()) < 0.01
    assert torch.equal(plain.scale, plain.scale.half().float())


def test_a_clip_search_helps() -> None:
    x = _numbers()
    clipped, plain = (fake_quantize(x, Q4_0, clip=clip) for clip in (mse_clip(x, Q4_0, norm=2.0), None))
    assert float((clipped - x)[-1].square().sum()) < 0.95 * float((plain - x)[-1].square().sum())


def test_the_gradient_of_a_signed_scale_is_that_of_finite_differences() -> None:
    x = torch.tensor([[3.0, -1.0, 0.4] + [0.1] * 29], dtype=torch.float32)

    def total(clip: float) -> float:
        return float(straight_through(x, Q4_0, torch.full((1, 1, 1), clip)).sum())

    clip = torch.full((1, 1, 1), 0.8, requires_grad=True)
    straight_through(x, Q4_0, clip).sum().backward()
    assert clip.grad is not None
    codes = quantize(x, Q4_0, clip=clip.detach()).codes.float()
    inside = codes > -8  # the largest is cut
    scale = 3.0 * 0.8 / -8
    expected = float((codes - torch.where(inside, x.view(1, 1, 32) / scale, 0.0)).sum()) * 3.0 / -8
    assert float(clip.grad) == pytest.approx(expected, rel=1e-3)
    assert total(0.8) != total(0.6)


def test_a_block_of_other_bits_or_groups_is_refused() -> None:
    for bits, granularity, block in ((8, PerGroup(32), "q4_0"), (4, PerChannel(), "q4_0"), (8, PerGroup(64), "q8_0")):
        with pytest.raises(ConfigError, match=f"block: got {block}, allowed:"):
            QuantFormat(bits, True, granularity, block=block)  # type: ignore[arg-type]


def test_configuration_and_numbers_mean_the_same_blocks() -> None:
    """Configuration is read without torch, so that it has a size of its own."""
    assert bits_config.BLOCK_SIZE == formats.BLOCK_SIZE
