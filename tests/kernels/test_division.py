"""Codes are divided by their scale by its reciprocal (`kernels/triton/rows.py:quotient`): the bits of a division."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

Row = NDArray[np.float32]


def fused(a: Row, b: Row, c: Row) -> Row:
    """A product and a sum rounded once: products of 24 bits are exact in float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize("ties", [False, True], ids=["any", "between two codes"])
def test_a_reciprocal_corrected_once_divides_exactly(ties: bool) -> None:
    generator = np.random.default_rng(0)
    scale = np.exp(6 * generator.normal(size=1 << 20)).astype(np.float32)
    codes = generator.integers(-8, 8, scale.shape) + 0.5 if ties else generator.uniform(-9, 9, scale.shape)
    x = (scale.astype(np.float64) * codes).astype(np.float32)
    over = np.float32(1) / scale
    near = x * over
    assert (near != x / scale).any()  # without the correction it does not
    assert (fused(fused(-near, scale, x), over, near) == x / scale).all()
