"""Codes as the bytes of llama.cpp's blocks of 32, and numbers as those of its 16- and 32-bit types.

Q4_0: a float16 scale d, then 16 bytes, byte j with code j in its low half and code j + 16 in its high one, stored from
0: x^ = d (code - 8). Q8_0: d, then 32 signed bytes: x^ = d code.

Shapes: O rows, G blocks of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from starquant.errors import ConfigError
from starquant.numerics import Quantized
from starquant.numerics.formats import BLOCK_SIZE, Block

#: Bytes of a block.
BLOCK_BYTES = {"q4_0": 18, "q8_0": 34}

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def block_bytes(quantized: Quantized, block: Block) -> Bytes:
    """Return codes and scales as bytes, [O, G * 18] or [O, G * 34].

    Args:
        quantized: codes [O, G, 32], scales [O, G, 1].
        block: their block type.

    Raises:
        ConfigError: codes or scales that the block type does not hold.
    """
    codes, low, high = quantized.codes, (-8 if block == "q4_0" else -128), (7 if block == "q4_0" else 127)
    if codes.dim() != 3 or codes.shape[-1] != BLOCK_SIZE or quantized.zero is not None:
        raise ConfigError(f"{block}: got codes {list(codes.shape)}, allowed: symmetric groups of {BLOCK_SIZE}")
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise ConfigError(f"{block}: got codes {int(codes.min())} to {int(codes.max())}, allowed: {low} to {high}")
    scale = quantized.scale.to(torch.float16)
    if not torch.equal(scale.float(), quantized.scale.float()):
        raise ConfigError(f"{block}: got scales that float16 does not hold; allowed: bits.weights.block={block}")
    if block == "q4_0":
        stored = (codes + 8).to(torch.uint8)
        payload = stored[..., :16] | (stored[..., 16:] << 4)
    else:
        payload = codes.to(torch.int8).view(torch.uint8)
    parts = torch.cat((scale.contiguous().view(torch.uint8), payload), -1)
    data: Bytes = parts.flatten(1).contiguous().numpy()
    return data


def float_bytes(x: Tensor, dtype: torch.dtype) -> Bytes:
    """Return numbers [..., D] in a floating-point type as bytes, [..., D * size of a number]."""
    data: Bytes = x.detach().to(dtype).contiguous().view(torch.uint8).numpy()
    return data
