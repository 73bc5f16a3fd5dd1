"""Triton: queries and keys of one projection's product to what attention reads: norm per head and rotary embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from starquant.kernels.triton.launch import early_arguments, start
from starquant.kernels.triton.rows import normed

#: Heads of a token that a program takes.
HEADS = 8


@triton.jit
def _turn_some(
    x_ptr,
    gain_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    token,
    position,
    first,
    heads,
    stride,
    width,
    turned,
    eps,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some heads of one token: x cos + (its other half, the second one's sign turned) sin, in float32."""
    head, e = first + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    half = turned // 2
    other = tl.where(e < half, e + half, tl.where(e < turned, e - half, e))
    mask = (head < heads)[:, None] & (e < width)[None, :]
    start = x_ptr + token.to(tl.int64) * stride + head[:, None] * width
    x = tl.load(start + e[None, :], mask=mask, other=0.0)
    y = tl.load(start + other[None, :], mask=mask, other=0.0)
    if NORM:
        squares = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)[:, None]
        gain = tl.load(gain_ptr + e, mask=e < width, other=0.0)[None, :]
        other_gain = tl.load(gain_ptr + other, mask=e < width, other=0.0)[None, :]
        x, y = normed(x, gain, squares, width, eps), normed(y, other_gain, squares, width, eps)
    else:
        x, y = x.to(tl.float32), y.to(tl.float32)
    cos = tl.load(cos_ptr + position * turned + e, mask=e < turned, other=1.0)[None, :]
    sin = tl.load(sin_ptr + position * turned + e, mask=e < turned, other=0.0)[None, :]
    z = x * cos + tl.where(e < half, -y, y) * sin
    to = y_ptr + (token.to(tl.int64) * heads + head)[:, None] * width + e[None, :]
    tl.store(to, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _turn(
    q_ptr,
    k_ptr,
    q_gain_ptr,
    k_gain_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    positions,
    q_heads,
    k_heads,
    q_stride,
    k_stride,
    width,
    turned,
    eps,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start(EARLY)
    token, part = tl.program_id(0), tl.program_id(1)
    position = token % positions
    parts_q = tl.cdiv(q_heads, HEADS)
    if part < parts_q:
        first = part * HEADS
        _turn_some(
            q_ptr,
            q_gain_ptr,
            q_out_ptr,
            cos_ptr,
            sin_ptr,
            token,
            position,
            first,
            q_heads,
            q_stride,
            width,
            turned,
            eps,
            NORM,
            HEADS,
            BLOCK,
        )
    else:
        first = (part - parts_q) * HEADS
        _turn_some(
            k_ptr,
            k_gain_ptr,
            k_out_ptr,
            cos_ptr,
            sin_ptr,
            token,
            position,
            first,
            k_heads,
            k_stride,
            width,
            turned,
            eps,
            NORM,
            HEADS,
            BLOCK,
        )


def turn(
    q_MD: Tensor,
    k_MD: Tensor,
    head_dim: int,
    cos_PR: Tensor,
    sin_PR: Tensor,
    q_gain_E: Tensor | None,
    k_gain_E: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys as `kernels.heads.turn_heads` does; gains of both or of none."""
    q_MD, k_MD = (x if x.stride(1) == 1 else x.contiguous() for x in (q_MD, k_MD))
    rows, heads = len(q_MD), [x.shape[1] // head_dim for x in (q_MD, k_MD)]
    q_MHE, k_MKE = (torch.empty(rows, n, head_dim, dtype=q_MD.dtype, device=q_MD.device) for n in heads)
    cos_PR, sin_PR = cos_PR.contiguous(), sin_PR.contiguous()
    if not rows:
        return q_MHE, k_MKE
    _turn[(rows, sum(triton.cdiv(n, HEADS) for n in heads))](
        q_MD,
        k_MD,
        q_MD if q_gain_E is None else q_gain_E.contiguous(),
        k_MD if k_gain_E is None else k_gain_E.contiguous(),
        q_MHE,
        k_MKE,
        cos_PR,
        sin_PR,
        len(cos_PR),
        *heads,
        q_MD.stride(0),
        k_MD.stride(0),
        head_dim,
        cos_PR.shape[1],
        eps,
        NORM=q_gain_E is not None,
        **early_arguments(q_MD),
        HEADS=HEADS,
        BLOCK=triton.next_power_of_2(head_dim),
    )
    return q_MHE, k_MKE
