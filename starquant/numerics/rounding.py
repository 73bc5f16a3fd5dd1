"""Round-to-nearest quantization on a uniform grid.

Symmetric: s = c * max|x| / qmax, q = clamp(round(x / s), qmin, qmax), x^ = s q.
Asymmetric: s = c * (max(x, 0) - min(x, 0)) / qmax, z = round(-c * min(x, 0) / s), q = clamp(round(x / s) + z, 0, qmax),
x^ = s (q - z).  The range always includes zero, so that zero is exact (as in QuaRot and GPTQ). Computed in float32.
The clip ratio c is the format's, times that of the row or group where `clip` gives one; where `clip` gives two, the
first multiplies the largest number and the second the smallest, and a symmetric grid covers the longer end.

Blocks of llama.cpp: Q4_0 has s = float16(c * m / -8) for the number m of largest magnitude, so that s may be negative;
Q8_0 has q = round(x / s) with s = max|x| / 127 and x^ = float16(s) q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starquant.errors import CheckpointError, ConfigError
from starquant.numerics.formats import PerGroup, QuantFormat
from starquant.numerics.row_pieces import by_rows

_SMALLEST_HALF, _LARGEST_HALF = 2.0**-24, torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Quantized:
    """Integer codes with their scales; grouped tensors are [..., groups, size].

    Attributes:
        codes: int16 codes.
        scale: float32, broadcastable to `codes`.
        zero: float32 integer zero points, None on a symmetric grid.
        shape: of the tensor that was quantized.
        qmin: smallest code of the grid.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: torch.Size
    qmin: int

    def to(self, device: torch.device) -> Quantized:
        """Return the same on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=zero)

    def of_rows(self, rows: slice) -> Quantized:
        """Return some rows of a quantized weight [O, I]."""
        codes, scale = self.codes[rows], self.scale[rows]
        shape = torch.Size((len(codes), *self.shape[1:]))
        return replace(self, codes=codes, scale=scale, zero=None if self.zero is None else self.zero[rows], shape=shape)

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what a file keeps: `prefix.codes` (uint8, the smallest code is 0), `prefix.scale`, `prefix.zero`."""
        tensors = {
            f"{prefix}.codes": (self.codes - self.qmin).to(torch.uint8).contiguous(),
            f"{prefix}.scale": self.scale.float().contiguous(),
        }
        if self.zero is not None:
            tensors[f"{prefix}.zero"] = self.zero.float().contiguous()
        return tensors

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], prefix: str, fmt: QuantFormat, shape: torch.Size | tuple[int, ...]
    ) -> Quantized:
        """Invert `to_tensors`.

        Raises:
            CheckpointError: a tensor is missing, or the codes do not fit the shape or the grid.
        """
        names = ("codes", "scale") if fmt.symmetric else ("codes", "scale", "zero")
        for name in names:
            if f"{prefix}.{name}" not in tensors:
                raise CheckpointError(f"{prefix}.{name}: missing")
        stored = tensors[f"{prefix}.codes"]
        shape = torch.Size(shape)
        if stored.numel() != shape.numel():
            raise CheckpointError(f"{prefix}.codes: got {list(stored.shape)}, needed: codes of {list(shape)}")
        if stored.numel() and int(stored.max()) > fmt.qmax - fmt.qmin:
            raise CheckpointError(f"{prefix}.codes: got {int(stored.max())}, allowed: 0 to {fmt.qmax - fmt.qmin}")
        zero = None if fmt.symmetric else tensors[f"{prefix}.zero"]
        return cls(stored.to(torch.int16) + fmt.qmin, tensors[f"{prefix}.scale"], zero, shape, fmt.qmin)


def grouped(x: Tensor, fmt: QuantFormat) -> Tensor:
    """Return `x` in float32 with the numbers that share a scale on the last axis.

    Raises:
        ConfigError: a group size that does not divide.
    """
    x = x.float()
    if not isinstance(fmt.granularity, PerGroup):
        return x
    size = fmt.granularity.size
    if x.shape[-1] % size:
        raise ConfigError(f"bits.weights.group_size: got {size}, which does not divide the {x.shape[-1]} inputs")
    runs: Tensor = x.unflatten(-1, (-1, size))
    return runs


def range_of(x: Tensor, fmt: QuantFormat) -> tuple[Tensor, ...]:
    """Return what the grid of each run is made of: its scale (symmetric), or its smallest and largest number."""
    if fmt.block == "q4_0":
        return (x.gather(-1, x.abs().argmax(-1, keepdim=True)).mul_(fmt.clip_ratio / fmt.qmin),)
    if fmt.symmetric:
        return (x.abs().amax(-1, keepdim=True).mul_(fmt.clip_ratio / fmt.qmax),)
    low = x.amin(-1, keepdim=True).clamp_max_(0.0) * fmt.clip_ratio
    return low, x.amax(-1, keepdim=True).clamp_min_(0.0) * fmt.clip_ratio


def grid_of_range(extent: tuple[Tensor, ...], fmt: QuantFormat, clip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return (scale, zero point) of runs from `range_of`; an empty one gets a scale that keeps zeros zero."""
    tiny = torch.finfo(torch.float32).tiny
    extent = extent if clip is None else tuple(end * clip for end in extent)
    if fmt.block == "q4_0":
        return _as_float16(extent[0]), None
    if fmt.symmetric:
        return extent[0].clamp_min(tiny), None
    low, high = extent
    scale = ((high - low) / fmt.qmax).clamp_min_(tiny)
    return scale, torch.round(-low / scale)


def _as_float16(scale: Tensor) -> Tensor:
    """Return float16 values of scales in float32, none of them zero or infinite."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return scale.abs().clamp_(_SMALLEST_HALF, _LARGEST_HALF).half().float() * sign


def stored_scale(scale: Tensor, fmt: QuantFormat) -> Tensor:
    """Return what codes are multiplied by: the scale that they were made with, but of Q8_0 its float16 value."""
    return scale.clamp_max(_LARGEST_HALF).half().float() if fmt.block == "q8_0" else scale


def grid_of(x: Tensor, fmt: QuantFormat, clip: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return (scale, zero point) of a grouped tensor; a row of zeros gets a scale that keeps it zero.

    `clip` has a ratio or two a run, or a row, which all groups of it share.
    """
    if clip is not None and 0 < clip.dim() == x.dim() - 1:
        clip = clip.unsqueeze(-2)
    if clip is None or clip.dim() == 0 or clip.shape[-1] == 1:
        return grid_of_range(range_of(x, fmt), fmt, clip)
    per_code = fmt.clip_ratio / fmt.qmax if fmt.symmetric else fmt.clip_ratio
    high = x.amax(-1, keepdim=True).clamp_min_(0.0).mul_(per_code) * clip[..., :1]
    low = x.amin(-1, keepdim=True).clamp_max_(0.0).mul_(per_code) * clip[..., 1:]
    return grid_of_range((torch.maximum(high, -low),) if fmt.symmetric else (low, high), fmt, None)


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: QuantFormat) -> Tensor:
    """Return the codes of float32 numbers, still in float32."""
    codes = torch.round(x / scale)
    if zero is not None:
        codes += zero
    return codes.clamp_(fmt.qmin, fmt.qmax)


def quantize(x: Tensor, fmt: QuantFormat, *, clip: Tensor | None = None) -> Quantized:
    """Quantize to integer codes.

    `clip` holds ratios above 0, at most 1, that multiply the format's: [..., 1] a row, [..., groups, 1] a group; or two
    in the place of one, of the largest and of the smallest number.

    Raises:
        ConfigError: a group size that does not divide, or a format that does not quantize.
    """
    if not fmt.quantizes:
        raise ConfigError("bits: 16 means full precision; there is nothing to quantize")
    runs = grouped(x, fmt)
    scale, zero = grid_of(runs, fmt, clip)
    codes = round_to_grid(runs, scale, zero, fmt).to(torch.int16)
    return Quantized(codes, stored_scale(scale, fmt), zero, x.shape, fmt.qmin)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the real values that the codes stand for, in the original shape."""
    codes = q.codes.float()
    if q.zero is not None:
        codes -= q.zero
    return (codes * q.scale).reshape(q.shape).to(dtype)


def fake_quantize(x: Tensor, fmt: QuantFormat, *, clip: Tensor | None = None) -> Tensor:
    """Return `dequantize(quantize(x))` in the dtype of `x`, without materialising codes; 16 bits return `x`."""
    if not fmt.quantizes:
        return x
    if clip is None or (clip.dim() > 1 and clip.shape[: x.dim() - 1] == x.shape[:-1]):
        return by_rows(lambda rows, ratios: _fake_quantize(rows, fmt, ratios), x, clip)
    return _fake_quantize(x, fmt, clip)


def _fake_quantize(x: Tensor, fmt: QuantFormat, clip: Tensor | None) -> Tensor:
    runs = grouped(x, fmt)
    scale, zero = grid_of(runs, fmt, clip)
    rounded = torch.round(runs / scale)
    if zero is not None:
        rounded = rounded.add_(zero).clamp_(fmt.qmin, fmt.qmax).sub_(zero)
    elif fmt.clip_ratio < 1.0 or clip is not None or fmt.block == "q4_0":  # else the largest is qmax already
        rounded = rounded.clamp_(fmt.qmin, fmt.qmax)
    return rounded.mul_(stored_scale(scale, fmt)).reshape(x.shape).to(x.dtype)
