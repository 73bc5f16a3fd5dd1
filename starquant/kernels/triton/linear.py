"""Triton: products with packed weights. Codes are unpacked in registers; the weight is read at 4 bits.

`linear` multiplies int8 activations on int8 tensor cores; its epilogue takes from int32 sums what zero points add, and
scales them. `linear_16` (W4A16, for few tokens, where reading the weight is all that counts) multiplies 16-bit
activations with codes turned to 16 bits. Both add the residual stream where it is handed over, so that a sublayer's
output is nowhere in memory without it.

A tile is W X^T: unpacked weights are the left operand, which Hopper's tensor cores take from registers, and few tokens
make a narrow tile, not a half-empty one. Where tiles are fewer than processors the inputs are split among several
programs a tile, whose partial sums a second kernel adds: exactly, being integers, and in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.offsets import Offsets
from starquant.kernels.tiles import Tile, tile
from starquant.kernels.triton.launch import early_arguments, start
from starquant.kernels.triton.unpacking import halves, settled, wholes

#: Tiles of tokens that are multiplied with one tile of the weight before the next is read.
GROUP = tl.constexpr(8)


@triton.jit
def added(y, residual):
    """Add to the residual stream, a product being rounded to its dtype first, as without kernels; float32."""
    return y.to(residual.dtype).to(tl.float32) + residual.to(tl.float32)


@triton.jit
def _linear(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    x_zero_ptr,
    x_sum_ptr,
    w_offsets_ptr,
    residual_ptr,
    y_ptr,
    rows,
    outputs,
    columns,
    split,
    BITS: tl.constexpr,
    FAST: tl.constexpr,
    INTEGER: tl.constexpr,
    SETTLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    PARTIAL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tiles_m, tiles_o = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_O)
    tile, part = tl.program_id(0), tl.program_id(1)
    first = (tile // (GROUP * tiles_o)) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inner = tile % (GROUP * tiles_o)
    m = (first + inner % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (inner // size) * BLOCK_O + tl.arange(0, BLOCK_O)
    j = tl.arange(0, BLOCK_J)
    row, output = m < rows, o < outputs
    # A 64-bit row offset: codes of a large layer pass 2^31 bytes from their start.
    width = columns * 2 if BITS <= 4 else columns
    x_at = x_ptr + m.to(tl.int64)[None, :] * width + j[:, None]
    w_at = w_ptr + o.to(tl.int64)[:, None] * columns + j[None, :]
    total = tl.zeros((BLOCK_O, BLOCK_M), dtype=tl.int32 if INTEGER else tl.float32)
    steps = tl.cdiv(tl.cdiv(columns, BLOCK_J), split)
    start(EARLY)
    for step in range(part * steps, (part + 1) * steps):
        begin = step * BLOCK_J
        if EVEN:
            packed = tl.load(w_at + begin, mask=output[:, None], other=0)
            low = tl.load(x_at + begin, mask=row[None, :], other=0)
        else:
            inside = begin + j < columns
            packed = tl.load(w_at + begin, mask=output[:, None] & inside[None, :], other=0)
            low = tl.load(x_at + begin, mask=row[None, :] & inside[:, None], other=0)
        if BITS <= 4:
            if EVEN:
                high = tl.load(x_at + begin + columns, mask=row[None, :], other=0)
            else:
                high = tl.load(x_at + begin + columns, mask=row[None, :] & inside[:, None], other=0)
            low_w, high_w = halves(packed, low.dtype, INTEGER, BITS, FAST)
            total = tl.dot(low_w, low, total, out_dtype=total.dtype)
            total = tl.dot(high_w, high, total, out_dtype=total.dtype)
        else:
            codes_w = wholes(packed, low.dtype, INTEGER, BITS, FAST)
            total = tl.dot(codes_w, low, total, out_dtype=total.dtype)
        if SETTLE:
            total = settled(total)
    if FAST and INTEGER and BITS <= 4:
        total = total >> 4
    where = m.to(tl.int64)[:, None] * outputs + o[None, :]
    inside_y = row[:, None] & output[None, :]
    if PARTIAL:
        tl.store(y_ptr + part.to(tl.int64) * rows * outputs + where, tl.trans(total), mask=inside_y)
    else:
        if HAS_ZERO:
            weight = tl.load(w_offsets_ptr + 2 * o + 1, mask=output, other=0)
            total -= weight[:, None] * tl.load(x_zero_ptr + m, mask=row, other=0)[None, :]
        if HAS_SUM:
            weight = tl.load(w_offsets_ptr + 2 * o, mask=output, other=0)
            total -= weight[:, None] * tl.load(x_sum_ptr + m, mask=row, other=0)[None, :]
        y = tl.trans(total).to(tl.float32)
        if INTEGER:
            y = y * tl.load(x_scale_ptr + m, mask=row, other=0.0)[:, None]
        y = y * tl.load(w_scale_ptr + o, mask=output, other=0.0)[None, :]
        if HAS_BIAS:
            y = y + tl.load(bias_ptr + o, mask=output, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            y = added(y, tl.load(residual_ptr + where, mask=inside_y, other=0.0))
        tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=inside_y)


@triton.jit
def _finish(
    parts_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    x_zero_ptr,
    x_sum_ptr,
    w_offsets_ptr,
    residual_ptr,
    y_ptr,
    rows,
    outputs,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start(EARLY)
    m, o = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    output, where = o < outputs, m.to(tl.int64) * outputs + o
    total = tl.load(parts_ptr + where, mask=output, other=0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts_ptr + part * tl.cast(rows, tl.int64) * outputs + where, mask=output, other=0)
    if HAS_ZERO:
        total -= tl.load(w_offsets_ptr + 2 * o + 1, mask=output, other=0) * tl.load(x_zero_ptr + m)
    if HAS_SUM:
        total -= tl.load(w_offsets_ptr + 2 * o, mask=output, other=0) * tl.load(x_sum_ptr + m)
    y = total.to(tl.float32)
    if INTEGER:
        y = y * tl.load(x_scale_ptr + m)
    y = y * tl.load(w_scale_ptr + o, mask=output, other=0.0)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + o, mask=output, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y = added(y, tl.load(residual_ptr + where, mask=output, other=0.0))
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=output)


def linear(
    x_MK: Tensor,
    x_scale_M1: Tensor,
    codes: Tensor,
    w_scale_O: Tensor,
    bits: int,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    settings: Tile | None = None,
    offsets: Offsets | None = None,
    residual_MO: Tensor | None = None,
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
        settings: of the launch; None for those of `tiles.tile`.
        offsets: where the grid of tokens or weight is asymmetric; None elsewhere.
        residual_MO: what the product is added to, in `dtype`; None for nothing.
    """
    return _launch(x_MK, x_scale_M1, codes, w_scale_O, bits, bias_O, dtype, True, settings, offsets, residual_MO)


def linear_16(
    x_MK: Tensor,
    codes: Tensor,
    w_scale_O: Tensor,
    bits: int,
    bias_O: Tensor | None = None,
    settings: Tile | None = None,
    residual_MO: Tensor | None = None,
) -> Tensor:
    """Return 16-bit activations times a packed weight [M, O], in their dtype; arguments as `linear`."""
    return _launch(x_MK, w_scale_O, codes, w_scale_O, bits, bias_O, x_MK.dtype, False, settings, None, residual_MO)


def _launch(
    x_MK: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    w_scale_O: Tensor,
    bits: int,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    integer: bool,
    settings: Tile | None,
    offsets: Offsets | None,
    residual_MO: Tensor | None,
) -> Tensor:
    rows, (outputs, columns) = len(x_MK), codes.shape
    y_MO = torch.empty(rows, outputs, dtype=dtype, device=x_MK.device)
    if not rows:
        return y_MO
    if settings is None:
        settings = tile(rows, outputs, columns, integer, x_MK.device)
    split = settings.split
    bias = w_scale_O if bias_O is None else bias_O.contiguous()
    x_scale, w_scale_O = x_scale.contiguous(), w_scale_O.contiguous()
    kind = torch.int32 if integer else torch.float32
    target = y_MO if split == 1 else torch.empty(split, rows, outputs, dtype=kind, device=x_MK.device)
    grid = (triton.cdiv(rows, settings.m) * triton.cdiv(outputs, settings.o), split)
    terms, flags = _optional_arguments(offsets, residual_MO, w_scale_O)
    same = {"INTEGER": integer, "HAS_BIAS": bias_O is not None} | flags | early_arguments(x_MK)
    _linear[grid](
        x_MK.contiguous(),
        codes,
        x_scale,
        w_scale_O,
        bias,
        *terms,
        target,
        rows,
        outputs,
        columns,
        split,
        BITS=bits,
        FAST=x_MK.is_cuda and bits in (4, 8),
        SETTLE=x_MK.is_cuda and not integer,
        EVEN=columns % (settings.j * split) == 0,
        PARTIAL=split > 1,
        BLOCK_M=settings.m,
        BLOCK_O=settings.o,
        BLOCK_J=settings.j,
        num_warps=settings.warps,
        num_stages=settings.stages,
        **same,
    )
    if split > 1:
        block = 1024
        _finish[(triton.cdiv(outputs, block), rows)](
            target, x_scale, w_scale_O, bias, *terms, y_MO, rows, outputs, SPLIT=split, BLOCK=block, **same
        )
    return y_MO


def _optional_arguments(
    offsets: Offsets | None, residual_MO: Tensor | None, unused: Tensor
) -> tuple[list[Tensor], dict[str, bool]]:
    """Return zero points, sums and residual as kernels take them, and which there are; `unused` for no tensor."""
    terms = (None, None, None) if offsets is None else (offsets.zero_M1, offsets.sum_M1, offsets.weight_O2)
    terms += (residual_MO,)
    flags = {"HAS_ZERO": terms[0] is not None, "HAS_SUM": terms[1] is not None, "HAS_RESIDUAL": terms[3] is not None}
    return [unused if term is None else term.contiguous() for term in terms], flags
