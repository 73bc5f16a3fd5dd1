"""Triton: packed codes in registers, as the numbers that are multiplied, a few instructions each."""

from __future__ import annotations

import triton
import triton.language as tl

#: Four packed bytes are eight codes c in two registers, as 16 (c - 8) each: shifted to the top of a byte, with the sign
#: bit turned, they are signed numbers. Sums are 16 times as large, still below 2^31, and divided exactly at the end.
UNPACK_4 = tl.constexpr(
    """{
    .reg .b32 t;
    shl.b32 t, $2, 4;
    lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;
    lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
    }"""
)
UNPACK_8 = tl.constexpr("xor.b32 $0, $1, 0x80808080;")


def _unpack_4_as(kind: str, high: int, one: int, less: int) -> str:
    """Return PTX that makes four packed bytes eight 16-bit numbers: a byte `high` above c, minus what that adds."""
    pairs = [(0, "l", 0x4140), (1, "l", 0x4342), (2, "h", 0x4140), (3, "h", 0x4342)]
    spread = "".join(f"prmt.b32 ${i}, {half}, {high * 0x01010101:#x}, {order:#x};" for i, half, order in pairs)
    minus = "".join(f"fma.rn.{kind}x2 ${i}, ${i}, one, less;" for i, _, _ in pairs)
    return f"""{{
    .reg .b32 l, h, one, less;
    mov.b32 one, {one * 0x00010001:#x};
    mov.b32 less, {less * 0x00010001:#x};
    and.b32 l, $4, 0x0F0F0F0F;
    shr.u32 h, $4, 4;
    and.b32 h, h, 0x0F0F0F0F;
    {spread}
    {minus}
    }}"""


#: The same as 16-bit numbers: 0x4300 | c is 128 + c in bfloat16, 0x6400 | c is 1024 + c in float16.
UNPACK_4_BF16 = tl.constexpr(_unpack_4_as("bf16", 0x43, 0x3F80, 0xC308))
UNPACK_4_FP16 = tl.constexpr(_unpack_4_as("f16", 0x64, 0x3C00, 0xE408))


@triton.jit
def settled(total):
    """Return sums of products that are over. What follows may write the registers that tensor cores still read.

    A 16-bit product is otherwise left in flight when a loop goes on, and of large products some sums were wrong on an
    H100 (.9 % of the norm of 128 x 37,888, inputs 3,584).
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [total], tl.float32, is_pure=True, pack=1)


@triton.jit
def halves(packed, dtype: tl.constexpr, INTEGER: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """Unpack two codes a byte, as what is multiplied; the first half of a row's inputs lies low."""
    if FAST and INTEGER:
        return tl.inline_asm_elementwise(UNPACK_4, "=&r,=&r,r", [packed], (tl.int8, tl.int8), True, 4)
    elif FAST and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            UNPACK_4_BF16, "=&r,=&r,=&r,=&r,r", [packed], (tl.bfloat16, tl.bfloat16), True, 4
        )
    elif FAST and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            UNPACK_4_FP16, "=&r,=&r,=&r,=&r,r", [packed], (tl.float16, tl.float16), True, 4
        )
    else:
        offset: tl.constexpr = 1 << (BITS - 1)
        low, high = (packed & 15).to(tl.int8) - offset, (packed >> 4).to(tl.int8) - offset
        return low.to(tl.int8).to(dtype), high.to(tl.int8).to(dtype)


@triton.jit
def wholes(packed, dtype: tl.constexpr, INTEGER: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """The same for one code a byte."""
    if FAST and INTEGER:
        return tl.inline_asm_elementwise(UNPACK_8, "=r,r", [packed], tl.int8, True, 4)
    else:
        return (packed.to(tl.int16) - (1 << (BITS - 1))).to(tl.int8).to(dtype)
