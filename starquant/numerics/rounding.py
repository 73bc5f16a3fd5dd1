"""Round-to-nearest quantization on a uniform grid.

Symmetric: s = c * max|x| / qmax, q = clamp(round(x / s), qmin, qmax), x^ = s q.
Asymmetric: s = c * (max(x, 0) - min(x, 0)) / qmax, z = round(-c * min(x, 0) / s), q = clamp(round(x / s) + z, 0, qmax),
x^ = s (q - z).  The range always includes zero, so that zero is exact (as in QuaRot and GPTQ). Computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starquant.errors import ConfigError
from starquant.numerics.formats import PerGroup, QuantFormat


@dataclass(frozen=True)
class Quantized:
    """Integer codes with their scales; grouped tensors are [..., groups, size].

    Attributes:
        codes: int16 codes.
        scale: float32, broadcastable to `codes`.
        zero: float32 integer zero points, None on a symmetric grid.
        shape: of the tensor that was quantized.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: torch.Size


def _grouped(x: Tensor, fmt: QuantFormat) -> Tensor:
    x = x.float()
    if not isinstance(fmt.granularity, PerGroup):
        return x
    size = fmt.granularity.size
    if x.shape[-1] % size:
        raise ConfigError(f"bits.weights.group_size: got {size}, which does not divide the {x.shape[-1]} inputs")
    grouped: Tensor = x.unflatten(-1, (-1, size))
    return grouped


def _grid(x: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor | None]:
    """Return (scale, zero point); a row of zeros gets a scale that keeps it zero."""
    tiny = torch.finfo(torch.float32).tiny
    if fmt.symmetric:
        return x.abs().amax(-1, keepdim=True).mul_(fmt.clip_ratio / fmt.qmax).clamp_min_(tiny), None
    low = x.amin(-1, keepdim=True).clamp_max_(0.0) * fmt.clip_ratio
    high = x.amax(-1, keepdim=True).clamp_min_(0.0) * fmt.clip_ratio
    scale = ((high - low) / fmt.qmax).clamp_min_(tiny)
    return scale, torch.round(-low / scale)


def quantize(x: Tensor, fmt: QuantFormat) -> Quantized:
    """Quantize to integer codes.

    Raises:
        ConfigError: a group size that does not divide, or a format that does not quantize.
    """
    if not fmt.quantizes:
        raise ConfigError("bits: 16 means full precision; there is nothing to quantize")
    grouped = _grouped(x, fmt)
    scale, zero = _grid(grouped, fmt)
    codes = torch.round(grouped / scale)
    if zero is not None:
        codes += zero
    codes.clamp_(fmt.qmin, fmt.qmax)
    return Quantized(codes.to(torch.int16), scale, zero, x.shape)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the real values that the codes stand for, in the original shape."""
    codes = q.codes.float()
    if q.zero is not None:
        codes -= q.zero
    return (codes * q.scale).reshape(q.shape).to(dtype)


def fake_quantize(x: Tensor, fmt: QuantFormat) -> Tensor:
    """Return `dequantize(quantize(x))` in the dtype of `x`, without materialising codes; 16 bits return `x`."""
    if not fmt.quantizes:
        return x
    grouped = _grouped(x, fmt)
    scale, zero = _grid(grouped, fmt)
    values = torch.round(grouped / scale)
    if zero is not None:
        values = values.add_(zero).clamp_(fmt.qmin, fmt.qmax).sub_(zero)
    elif fmt.clip_ratio < 1.0:  # unclipped, the largest magnitude is qmax already
        values = values.clamp_(fmt.qmin, fmt.qmax)
    return values.mul_(scale).reshape(x.shape).to(x.dtype)
