"""Triton: products with packed weights. Codes are unpacked in registers; the weight is read at 4 bits.

`linear` multiplies int8 activations on int8 tensor cores and scales int32 sums in the epilogue; `linear_16` (W4A16, for
few tokens, where reading the weight is all that counts) multiplies 16-bit activations with codes turned to 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _linear(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    rows,
    outputs,
    width,
    offset,
    HALVED: tl.constexpr,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    j = tl.arange(0, BLOCK_J)
    columns = width // 2 if HALVED else width
    row, output = m < rows, o < outputs
    # A 64-bit row offset: codes of a large layer pass 2^31 bytes from their start.
    x_row, w_row = m.to(tl.int64)[:, None] * width, o.to(tl.int64)[None, :] * columns
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.int32 if INTEGER else tl.float32)
    for begin in range(0, columns, BLOCK_J):
        at = begin + j
        inside = at < columns
        packed = tl.load(w_ptr + w_row + at[:, None], mask=output[None, :] & inside[:, None], other=0)
        low = tl.load(x_ptr + x_row + at[None, :], mask=row[:, None] & inside[None, :], other=0)
        if HALVED:
            high = tl.load(x_ptr + x_row + columns + at[None, :], mask=row[:, None] & inside[None, :], other=0)
            low_w = ((packed & 15).to(tl.int8) - offset).to(tl.int8).to(low.dtype)
            high_w = ((packed >> 4).to(tl.int8) - offset).to(tl.int8).to(low.dtype)
            total = tl.dot(low, low_w, total, out_dtype=total.dtype)
            total = tl.dot(high, high_w, total, out_dtype=total.dtype)
        else:
            codes = (packed.to(tl.int16) - offset).to(tl.int8).to(low.dtype)
            total = tl.dot(low, codes, total, out_dtype=total.dtype)
    y = total.to(tl.float32)
    if INTEGER:
        y = y * tl.load(x_scale_ptr + m, mask=row, other=0.0)[:, None]
    y = y * tl.load(w_scale_ptr + o, mask=output, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + o, mask=output, other=0.0).to(tl.float32)[None, :]
    where = m.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=row[:, None] & output[None, :])


def linear(
    x_MK: Tensor,
    x_scale_M1: Tensor,
    codes: Tensor,
    w_scale_O: Tensor,
    bits: int,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return integer tokens times a packed weight [M, O]; int32 sums equal `reference.accumulate`.

    Args:
        x_MK: int8 codes.
        x_scale_M1: float32.
        codes: uint8, packed [O, K / 2] up to 4 bits, [O, K] above.
        w_scale_O: float32.
        bits: of the weight.
        bias_O: None for none.
        dtype: of what is returned.
    """
    return _launch(x_MK, x_scale_M1, codes, w_scale_O, bits, bias_O, dtype, integer=True)


def linear_16(x_MK: Tensor, codes: Tensor, w_scale_O: Tensor, bits: int, bias_O: Tensor | None = None) -> Tensor:
    """Return 16-bit activations times a packed weight [M, O], in their dtype; arguments as `linear`."""
    return _launch(x_MK, w_scale_O, codes, w_scale_O, bits, bias_O, x_MK.dtype, integer=False)


def _launch(
    x_MK: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    w_scale_O: Tensor,
    bits: int,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    integer: bool,
) -> Tensor:
    (rows, width), outputs = x_MK.shape, len(codes)
    y_MO = torch.empty(rows, outputs, dtype=dtype, device=x_MK.device)
    settings = tile(rows, integer)
    grid = (triton.cdiv(rows, settings["BLOCK_M"]), triton.cdiv(outputs, settings["BLOCK_O"]))
    _linear[grid](
        x_MK.contiguous(),
        codes,
        x_scale.contiguous(),
        w_scale_O.contiguous(),
        w_scale_O if bias_O is None else bias_O.contiguous(),
        y_MO,
        rows,
        outputs,
        width,
        1 << (bits - 1),
        HALVED=bits <= 4,
        INTEGER=integer,
        HAS_BIAS=bias_O is not None,
        **settings,
    )
    return y_MO


def tile(rows: int, integer: bool) -> dict[str, int]:
    """Return the launch settings: few tokens are bound by bytes, many by the tensor cores. Not tuned.

    Shared memory stays below 99 KB, what compute capability 8.6 and 8.9 have (`tests/kernels` compiles for them).
    """
    sizes = (16, 64, 128, 4) if rows <= 16 else (64, 64, 128, 4) if rows <= 64 else (128, 128, 64, 8)
    if not integer:  # two bytes a number
        sizes = (16, 64, 64, 4) if rows <= 16 else (64, 64, 32, 4)
    names = ("BLOCK_M", "BLOCK_O", "BLOCK_J", "num_warps")
    return dict(zip(names, sizes, strict=True)) | {"num_stages": 3 if integer else 2}
