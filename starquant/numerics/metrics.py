"""Signal-to-quantization-noise ratio."""

from __future__ import annotations

import math

from torch import Tensor

from starquant.numerics.chunks import row_slices


class SqnrMeter:
    """Accumulate 10 log10(sum x^2 / sum (x - x^)^2) over many tensors, in float64."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def update(self, x: Tensor, x_quantized: Tensor) -> None:
        """Add a tensor and its quantized version."""
        for rows in row_slices(x) if x.dim() else (...,):
            exact = x[rows].detach().double()
            self._signal += float(exact.square().sum())
            self._noise += float((exact - x_quantized[rows].detach().double()).square().sum())

    def value(self) -> float | None:
        """Return decibels; None when nothing was seen or nothing was lost (the ratio is infinite)."""
        if self._noise == 0.0 or self._signal == 0.0:
            return None
        return 10.0 * math.log10(self._signal / self._noise)


def sqnr_db(x: Tensor, x_quantized: Tensor) -> float | None:
    """Return the ratio in decibels for one tensor; None when it is infinite or the signal is zero."""
    meter = SqnrMeter()
    meter.update(x, x_quantized)
    return meter.value()
