"""Codes of up to 4 bits, two a byte: byte j of a row holds code j low and code j + K/2 high."""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.errors import CheckpointError


def pack(codes_OK: Tensor) -> Tensor:
    """Return codes 0 to 15, [O, K], two a byte: uint8 [O, K / 2].

    Raises:
        CheckpointError: an odd number of inputs.
    """
    if codes_OK.shape[-1] % 2:
        raise CheckpointError(f"packing: got {codes_OK.shape[-1]} inputs, allowed: an even number")
    low, high = codes_OK.to(torch.uint8).chunk(2, -1)
    return low | (high << 4)


def unpack(packed_OJ: Tensor) -> Tensor:
    """Invert `pack`: uint8 [O, K]."""
    return torch.cat((packed_OJ & 15, packed_OJ >> 4), -1)
