"""How float32 matrices are multiplied while a method learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from starquant.config.methods.base import Products


@contextmanager
def products_as(chosen: Products, fewest_bits: int) -> Iterator[None]:
    """Multiply float32 matrices as options say; bfloat16 is used where the machine is faster with it.

    Args:
        chosen: of the options.
        fewest_bits: that anything is rounded to.
    """
    fast = chosen == "bfloat16" or (chosen == "auto" and fewest_bits <= 4)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if fast else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
