"""Zero points on the integer path: exact products, the codes of `numerics`, and what needs none of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.kernels import (
    IntegerTokens,
    Prologue,
    TokenStates,
    integer_linear,
    quantize_tokens,
    row_chunks,
    sums_fit,
    weight_offsets,
)
from starquant.numerics import (
    PerChannel,
    PerToken,
    QuantFormat,
    dequantize,
    fake_quantize,
    quantize,
    row_pieces,
    state_indices,
)
from starquant.quantized.packed_linear import PackedLinear

#: (activations, weights) symmetric, but for (True, True), which needs no offsets.
GRIDS = [(False, True), (True, False), (False, False)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(bits: int, symmetric: bool, outputs: int = 13, width: int = 38, bias: bool = True) -> PackedLinear:
    fmt, linear = QuantFormat(bits, symmetric, PerChannel()), nn.Linear(width, outputs, bias=bias)
    with torch.no_grad():
        for seed, parameter in enumerate(linear.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed) + 0.3)
    new = PackedLinear.from_linear(linear.requires_grad_(False), quantize(linear.weight.data, fmt), fmt)
    new.prepare_offsets()
    return new


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("of_tokens", "of_weight"), GRIDS)
def test_products_are_exact(of_tokens: bool, of_weight: bool, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sums of (q - z) in float64, in one chunk of the weight and in several; near fake quantization's."""
    linear, x = packed(bits, of_weight), randn(3, 7, 38, seed=9) - 0.2
    x_format = QuantFormat(bits, of_tokens, PerToken())
    sides = [quantize(x, x_format), linear.quantized()]
    x_q, w_q = (q.codes.double() - (0 if q.zero is None else q.zero) for q in sides)
    exact = (x_q @ w_q.T).float() * sides[0].scale * linear.scale[:, 0]
    for size in (2**22, 38 * 5):
        monkeypatch.setattr(row_chunks, "PRODUCT", size)
        tokens = quantize_tokens(x, bits, 1.0, Prologue(), of_tokens, not of_weight)
        assert torch.equal(linear(tokens), exact + linear.bias)
    torch.testing.assert_close(linear(tokens), F.linear(fake_quantize(x, x_format), dequantize(sides[1]), linear.bias))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_and_zero_points_are_those_of_the_grid(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios of the format and of token states cut both ends; rows of one sign, of zeros, of one number."""
    x = torch.cat((randn(5, 24), randn(2, 24, seed=1).abs(), -randn(2, 24, seed=2).abs(), torch.zeros(1, 24)))
    x = torch.cat((x, torch.full((1, 24), -3.0), 1e-40 * randn(2, 24, seed=3)))
    masked, clip_S = torch.arange(len(x)) % 3 == 0, torch.tensor([0.5, 0.75])
    solved = quantize(x, QuantFormat(bits, False, PerToken(), 0.9), clip=torch.where(masked, *clip_S)[:, None])
    prologue = Prologue(states=TokenStates(state_indices(masked), clip_S=clip_S))
    for piece in (2**17, 24 * 4):
        monkeypatch.setattr(row_pieces, "PIECE", piece)
        tokens = quantize_tokens(x, bits, 0.9, prologue, False, True)
        assert solved.zero is not None and tokens.zero is not None and tokens.sum is not None
        middle = 1 << (bits - 1)
        assert torch.equal(tokens.codes.int() + middle, solved.codes.int())
        assert torch.equal(tokens.zero + middle, solved.zero.int()) and torch.equal(tokens.scale, solved.scale)
        assert tokens.codes.dtype == torch.int8 and tokens.zero.dtype == tokens.sum.dtype == torch.int32
        assert torch.equal(tokens.sum[:, 0], tokens.codes.long().sum(1).int())
    widest = (x.amax(1) - x.amin(1).clamp(max=0)).argmax()
    cut = float(tokens.scale[widest]) * ((1 << bits) - 1)
    reach = float(x[widest].amax().clamp(min=0) - x[widest].amin().clamp(max=0))
    assert cut == pytest.approx(0.9 * float(clip_S[0 if masked[widest] else 1]) * reach)


def test_offsets_of_a_weight() -> None:
    """Two rows by hand: codes 0 1 14 15 of 4 bits are -8 -7 6 7, zero point 3 is -5."""
    codes = torch.tensor([[0 | 14 << 4, 1 | 15 << 4], [5 | 5 << 4, 5 | 5 << 4]], dtype=torch.uint8)
    zero = torch.tensor([[3.0], [8.0]])
    assert weight_offsets(codes, zero, 4).tolist() == [[-5, 30 - 4 * 3], [0, 20 - 4 * 8]]
    assert weight_offsets(codes, None, 4).tolist() == [[0, 30 - 4 * 8], [0, 20 - 4 * 8]]
    assert weight_offsets(torch.tensor([[0, 255, 7]], dtype=torch.uint8), None, 8).tolist() == [[0, 262 - 3 * 128]]


def test_symmetric_grids_carry_nothing() -> None:
    tokens = quantize_tokens(randn(2, 3, 38), 4)
    assert tokens.zero is None and tokens.sum is None
    linear = packed(4, True)
    assert torch.equal(linear(tokens), integer_linear(tokens, linear.codes, linear.scale, 4, linear.bias))


def test_tokens_without_sums_are_not_multiplied_with_an_asymmetric_weight() -> None:
    with pytest.raises(AssertionError):
        packed(4, False)(quantize_tokens(randn(2, 38), 4))
    with pytest.raises(AssertionError):
        linear = packed(4, True)
        linear.offsets = None
        linear(quantize_tokens(randn(2, 38), 4, 1.0, Prologue(), False))


def test_rows_of_tokens_keep_their_zero_points() -> None:
    """What an expert of a mixture reads of a shared site."""
    linear, x = packed(4, False), quantize_tokens(randn(2, 3, 38), 8, 1.0, Prologue(), False, True)
    whole, rows = linear(x), (torch.tensor([1, 0]), torch.tensor([2, 0]))
    assert torch.equal(linear(x[rows]), whole[rows])
    empty = x[:, :0]
    assert isinstance(empty, IntegerTokens) and linear(empty).shape == (2, 0, 13)


def largest_sum(width: int, x: QuantFormat, w: QuantFormat) -> int:
    ends = [[q - z for q in (g.qmin, g.qmax) for z in ([0] if g.symmetric else [0, g.qmax])] for g in (x, w)]
    return width * max(abs(a * b) for a, b in itertools.product(*ends))


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (8, 8)])
@pytest.mark.parametrize("symmetric", [*GRIDS, (True, True)])
def test_sums_that_int32_does_not_hold_are_told(bits: tuple[int, int], symmetric: tuple[bool, bool]) -> None:
    x, w = (QuantFormat(b, s, PerToken()) for b, s in zip(bits, symmetric, strict=True))
    for width in (33_025, 33_026, 65_793, 65_794, 131_071, 131_072, 2**22):
        assert sums_fit(width, x, w) == (largest_sum(width, x, w) < 2**31)


def test_the_widest_sum_is_exact() -> None:
    """Every term at its end: 8 bits on both sides, both asymmetric, as wide as int32 takes."""
    width = 33_025
    codes = torch.full((1, width), 255, dtype=torch.uint8)
    tokens = IntegerTokens(
        torch.full((1, width), 127, dtype=torch.int8),
        torch.ones(1, 1),
        torch.float64,
        zero=torch.full((1, 1), -128, dtype=torch.int32),
        sum=torch.full((1, 1), 127 * width, dtype=torch.int32),
    )
    offsets = weight_offsets(codes, torch.zeros(1, 1), 8)
    y = integer_linear(tokens, codes, torch.ones(1, 1), 8, None, offsets)
    assert y.item() == pytest.approx(255 * 255 * width, rel=1e-7)


def test_the_ops_are_what_compilation_sees() -> None:
    linear, x = packed(4, False), randn(3, 38)
    states: list[Any] = [None, None, None, None, 1.0, None, 0, 0, None]
    for front in ((None, None, 0.0), (randn(3, 38), None, 0.0), (None, randn(38), 1e-5)):
        torch.library.opcheck(torch.ops.starquant.quantize_tokens.default, (x, 4, 1.0, False, True, *states, *front))
    tokens = quantize_tokens(x, 4, 1.0, Prologue(), False, True)
    arguments = (tokens.codes, tokens.scale, linear.codes, linear.scale, 4, linear.bias, tokens.zero, tokens.sum)
    for residual in (None, randn(3, len(linear.codes))):
        whole = (*arguments, linear.offsets, residual, torch.float32)
        torch.library.opcheck(torch.ops.starquant.integer_linear.default, whole)
        assert torch.equal(torch.ops.starquant.integer_linear(*whole), linear(tokens, residual))
