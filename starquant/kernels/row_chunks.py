"""Products with packed weights on a CPU, some rows of the weight at a time, so that it is never unpacked whole.

A product takes hundreds of rows at once: fewer are multiplied at less than the library's full speed. They are unpacked
in smaller pieces, each step of which reads from cache what the step before has written there. Buffers last for one call
and serve all of its chunks. Tokens are quantized some at a time, for the same reason.

Shape suffixes beside those of the package: G groups of a row (1 where a row has one scale), R rows of a chunk or piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from starquant.kernels import reference
from starquant.kernels.offsets import Offsets
from starquant.kernels.reference import accumulate, scaled
from starquant.kernels.tokens import NO_PROLOGUE, Prologue
from starquant.numerics import rows_at_once
from starquant.numerics.chunks import slices

#: Numbers of the weight that one product takes.
PRODUCT = 2**22


def value_linear(
    x_MK: Tensor, codes: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, bias_O: Tensor | None
) -> Tensor:
    """Return x W^T + b, [M, O], where W is the weight that the codes stand for, in the dtype of x.

    W has the bits of `numerics.dequantize`. The product is `F.linear`'s, of R rows at a time: the same bits where one
    chunk has all rows, else sums of the same numbers, which the library may take in another order.

    Args:
        x_MK: floating point.
        codes: as `quantized.packed_linear` stores them.
        scale_OG: float32.
        zero_OG: float32 zero points; None where the grid is symmetric.
        bits: of the weight.
        bias_O: None for none.
    """
    y_MO = x_MK.new_empty(len(x_MK), len(codes))
    for rows, w_RK in _value_chunks(codes, scale_OG, zero_OG, bits, x_MK):
        y_MO[:, rows] = F.linear(x_MK, w_RK, None if bias_O is None else bias_O[rows])
    return y_MO


def value_linear_gradient(y_MO: Tensor, codes: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int) -> Tensor:
    """Return the gradient of what `value_linear` reads, [M, K], from that of what it returns."""
    x_MK = y_MO.new_zeros(len(y_MO), _width(codes, bits))
    for rows, w_RK in _value_chunks(codes, scale_OG, zero_OG, bits, y_MO):
        x_MK.addmm_(y_MO[:, rows], w_RK)
    return x_MK


def integer_linear(
    x_MK: Tensor,
    x_scale_M1: Tensor,
    codes: Tensor,
    scale_O: Tensor,
    bits: int,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    offsets: Offsets | None = None,
) -> Tensor:
    """Return the product of int8 tokens and packed weights, [M, O]: bit for bit the reference's, sums being exact."""
    y_MO = x_MK.new_empty(len(x_MK), len(codes), dtype=dtype)
    size = _rows_of_a_product(codes, bits)
    w_RK = codes.new_empty(size, _width(codes, bits))
    for rows in slices(len(codes), size):
        part_RK = w_RK[: rows.stop - rows.start]
        _Piece(part_RK, bits, 1 << (bits - 1)).read(codes[rows])
        sums_MR = accumulate(x_MK, part_RK.view(torch.int8))
        if offsets is not None:
            offsets.of_channels(rows).subtract(sums_MR)
        y_MO[:, rows] = scaled(sums_MR, x_scale_M1, scale_O[rows], None if bias_O is None else bias_O[rows], dtype)
    return y_MO


def quantize_rows(
    x_MK: Tensor,
    bits: int,
    clip_ratio: float = 1.0,
    prologue: Prologue = NO_PROLOGUE,
    symmetric: bool = True,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """Return what `reference.quantize_rows` does, a piece of the tokens at a time."""
    size = rows_at_once(x_MK.shape[1])
    if len(x_MK) <= size:
        return reference.quantize_rows(x_MK, bits, clip_ratio, prologue, symmetric, sums)
    whole: tuple[Tensor, ...] = ()
    for rows in slices(len(x_MK), size):
        states = prologue.states
        part = prologue if states is None else replace(prologue, states=replace(states, state=states.state[rows]))
        pieces = reference.quantize_rows(x_MK[rows], bits, clip_ratio, part, symmetric, sums)
        whole = whole or tuple([piece.new_empty(len(x_MK), piece.shape[1]) for piece in pieces])
        for target, piece in zip(whole, pieces, strict=True):
            target[rows] = piece
    return whole


def read_values(codes: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, out_OK: Tensor) -> None:
    """Write the values that codes stand for to [O, K], computed and rounded as by `numerics.dequantize`."""
    if len(codes) == 0:
        return
    size = min(len(codes), rows_at_once(out_OK.shape[1]))
    piece = _Piece(codes.new_empty(size, out_OK.shape[1]), bits, 1 << (bits - 1) if zero_OG is None else 0)
    float_RK = codes.new_empty(size, out_OK.shape[1], dtype=torch.float32)
    runs_RGS = float_RK.view(size, scale_OG.shape[1], -1)
    even = len(codes) - len(codes) % size
    packed, out = codes[:even].split(size), out_OK[:even].split(size)
    scale = scale_OG[:even, :, None].split(size)
    zero = None if zero_OG is None else zero_OG[:even, :, None].split(size)
    for i in range(len(packed)):
        piece.read(packed[i])
        float_RK.copy_(piece.signed_RK if zero is None else piece.codes_RK)
        if zero is not None:
            runs_RGS.sub_(zero[i])
        runs_RGS.mul_(scale[i])
        out[i].copy_(float_RK)
    if even < len(codes):
        read_values(codes[even:], scale_OG[even:], None if zero_OG is None else zero_OG[even:], bits, out_OK[even:])


class _Piece:
    """A buffer that rows of codes are unpacked to; its views are made once, for one costs as much as a step.

    Attributes:
        codes_RK: uint8, less `middle`.
        signed_RK: the same memory as int8, which is right where `middle` is that of a signed grid.
    """

    def __init__(self, codes_RK: Tensor, bits: int, middle: int) -> None:
        self.codes_RK, self.signed_RK, self.bits, self.middle = codes_RK, codes_RK.view(torch.int8), bits, middle
        self._low_RJ, self._high_RJ = codes_RK.tensor_split(2, 1)

    def read(self, codes: Tensor) -> None:
        """Unpack as many rows as the buffer has."""
        if self.bits > 4:
            torch.sub(codes, self.middle, out=self.codes_RK)
            return
        torch.bitwise_and(codes, 15, out=self._low_RJ)
        torch.bitwise_right_shift(codes, 4, out=self._high_RJ)
        if self.middle:
            self.codes_RK.sub_(self.middle)


def _value_chunks(
    codes: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, like: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their values [R, K] in the dtype of `like`), which the next chunk overwrites."""
    size = _rows_of_a_product(codes, bits)
    w_RK = like.new_empty(size, _width(codes, bits))
    for rows in slices(len(codes), size):
        part_RK = w_RK[: rows.stop - rows.start]
        read_values(codes[rows], scale_OG[rows], None if zero_OG is None else zero_OG[rows], bits, part_RK)
        yield rows, part_RK


def _width(codes: Tensor, bits: int) -> int:
    """Return the inputs K of packed codes."""
    return codes.shape[1] * (2 if bits <= 4 else 1)


def _rows_of_a_product(codes: Tensor, bits: int) -> int:
    """Return how many rows a product takes: at most all, at least one, where they are many a multiple of 64."""
    rows = max(1, PRODUCT // _width(codes, bits))
    return min(len(codes), rows - rows % 64 if rows > 64 else rows)
