"""What stands in front of a site and behind a linear, handed over so that one pass may hold it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starquant.kernels import Norm, integer_linear, quantize_tokens
from starquant.models.layers import InputSite, RMSNorm, added, site_input
from starquant.numerics import PerChannel, QuantFormat, quantize, rms_norm
from starquant.quantized.packed_linear import PackedLinear


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_norm_is_its_formula() -> None:
    x, gain = drawn(3, 7, 40).double(), drawn(40, seed=1).double()
    exact = gain * x / (x.square().sum(-1, keepdim=True) / 40 + 1e-5).sqrt()
    torch.testing.assert_close(rms_norm(x.float(), gain.float(), 1e-5), exact.float(), rtol=1e-5, atol=1e-6)
    low = rms_norm(x.bfloat16(), gain.bfloat16(), 1e-5)
    assert low.dtype == torch.bfloat16 and float((low.double() - exact).abs().max()) < 0.05


@torch.no_grad()
def test_a_site_computes_what_stands_in_front_of_it() -> None:
    norm, site, x, gate = RMSNorm(16, 1e-5), InputSite(), drawn(2, 5, 16), drawn(2, 5, 16, seed=1)
    norm.weight.copy_(1 + 0.1 * drawn(16, seed=2))
    seen: list[torch.Tensor] = []
    site.register_forward_pre_hook(lambda _, args: seen.append(site_input(args)))
    for front, expected in ((None, x), (norm, norm(x)), (gate, F.silu(gate) * x)):
        assert torch.equal(site(x, None, front), expected) and torch.equal(seen[-1], expected)
    assert not torch.equal(norm(x), x)


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_behind_a_norm_are_those_of_its_result(symmetric: bool) -> None:
    x, norm = drawn(2, 5, 24), Norm(1 + 0.1 * drawn(24, seed=1), 1e-6)
    found, expected = (
        quantize_tokens(x, 4, 0.9, symmetric=symmetric, front=norm),
        quantize_tokens(norm.apply(x), 4, 0.9, symmetric=symmetric),
    )
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)
    assert not torch.equal(found.scale, quantize_tokens(x, 4, 0.9, symmetric=symmetric).scale)


@torch.no_grad()
def test_a_sublayer_is_added_by_its_linear_where_that_can() -> None:
    stream, h = drawn(2, 5, 6, seed=3), drawn(2, 5, 8, seed=4)
    plain = nn.Linear(8, 6)
    assert torch.equal(added(stream, plain, h), stream + plain(h))
    grid = QuantFormat(4, True, PerChannel())
    packed = PackedLinear.from_linear(plain, quantize(plain.weight.data, grid), grid)
    tokens = quantize_tokens(h, 8)
    handed: list[int] = []
    packed.register_forward_pre_hook(lambda _, args: handed.append(len(args)))
    for read in (h, tokens):
        assert torch.equal(added(stream, packed, read), stream + packed(read))  # type: ignore[arg-type]
    assert handed == [2, 1, 2, 1], "the residual went elsewhere than to the linear"
    direct = integer_linear(tokens, packed.codes, packed.scale, 4, packed.bias, None, stream)
    assert torch.equal(direct, stream + packed(tokens))
