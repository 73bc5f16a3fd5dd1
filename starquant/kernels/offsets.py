"""What zero points add to a product of codes.

Codes of b bits are multiplied as signed numbers, int8 and two a byte, on every grid: code q of an asymmetric grid, 0 to
2^b - 1, is held as q - 2^(b-1), and so is its zero point, which leaves their difference as it was. On a symmetric grid
the zero point is 0. With codes X and W and zero points x and w

    sum_k (X_k - x)(W_k - w) = sum_k X_k W_k - x sum_k (W_k - w) - w sum_k X_k

where the first sum is the one of symmetric grids, the second is the weight's (made once) and the third is made with the
tokens' codes. Every term is an integer: results are exact where int32 holds them (`sums_fit`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starquant.kernels.packing import unpack
from starquant.numerics import QuantFormat
from starquant.numerics.chunks import row_slices


@dataclass(frozen=True)
class Offsets:
    """The zero points and sums of one product, int32; at least one of tokens' is there.

    Attributes:
        weight_O2: zero point w of each channel, and its sum of W - w.
        zero_M1: zero point x of each token; None where their grid is symmetric.
        sum_M1: sum of each token's codes; None where the weight's grid is symmetric.
    """

    weight_O2: Tensor
    zero_M1: Tensor | None
    sum_M1: Tensor | None

    def of_channels(self, rows: slice) -> Offsets:
        """Return those of some channels."""
        return replace(self, weight_O2=self.weight_O2[rows])

    def subtract(self, sums_MO: Tensor) -> Tensor:
        """Return sums of products of codes, [M, O], less what zero points add to them; in place."""
        zero_O, sum_O = self.weight_O2.unbind(1)
        if self.zero_M1 is not None:
            sums_MO.addcmul_(self.zero_M1, sum_O, value=-1)
        if self.sum_M1 is not None:
            sums_MO.addcmul_(self.sum_M1, zero_O, value=-1)
        return sums_MO


def weight_offsets(codes: Tensor, zero_O1: Tensor | None, bits: int) -> Tensor:
    """Return `Offsets.weight_O2` of codes as `quantized.packed_linear` stores them.

    Args:
        codes: from 0, packed [O, K / 2] up to 4 bits, [O, K] above.
        zero_O1: zero points as stored, 0 to 2^b - 1; None where the grid is symmetric.
        bits: of the weight.
    """
    middle, width = 1 << (bits - 1), codes.shape[1] * (2 if bits <= 4 else 1)
    offsets_O2 = torch.zeros(len(codes), 2, dtype=torch.int32, device=codes.device)
    if zero_O1 is not None:
        offsets_O2[:, 0] = zero_O1[:, 0].int() - middle
    for rows in row_slices(codes):
        part = unpack(codes[rows]) if bits <= 4 else codes[rows]
        offsets_O2[rows, 1] = part.sum(1, dtype=torch.int32)
    offsets_O2[:, 1] -= width * (middle + offsets_O2[:, 0])
    return offsets_O2


def sums_fit(inputs: int, token_format: QuantFormat, weight_format: QuantFormat) -> bool:
    """Return whether int32 holds every sum over so many inputs: 131,071 of 8 bits, 33,025 where both are asymmetric."""
    largest = 1
    for grid in (token_format, weight_format):
        largest *= 1 << (grid.bits - 1) if grid.symmetric else grid.qmax
    return inputs * largest < 2**31
