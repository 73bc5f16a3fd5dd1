"""What the kernels' inline PTX does, instruction by instruction: the interpreter cannot run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the extra 'triton' is not installed")

NAMES = ("UNPACK_4", "UNPACK_8", "UNPACK_4_BF16", "UNPACK_4_FP16")


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The PTX as the kernels hold it; read in a process of its own, which may import Triton."""
    code = "import json, starquant.kernels.triton.unpacking as t\n"
    code += f"print(json.dumps({{n: getattr(t, n).value for n in {NAMES!r}}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    return json.loads(done.stdout)


def halves(register: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.uint16).view(dtype)


def joined(values: torch.Tensor) -> int:
    low, high = values.view(torch.uint16).tolist()
    return low | high << 16


def executed(ptx: str, inputs: int, outputs: int) -> list[int]:
    """Run straight-line PTX on 32-bit registers; returns $0, $1, ... ."""
    registers: dict[str, int] = {f"${outputs}": inputs}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in (part.strip() for part in re.sub(r"[{}]", "", ptx).split(";")):
        if not line or line.startswith(".reg"):
            continue
        operation, operands = line.split(None, 1)
        target, *names = (name.strip() for name in operands.split(","))
        a = [value(name) for name in names]
        if operation == "mov.b32":
            found = a[0]
        elif operation == "shl.b32":
            found = a[0] << a[1]
        elif operation == "shr.u32":
            found = a[0] >> a[1]
        elif operation == "and.b32":
            found = a[0] & a[1]
        elif operation == "xor.b32":
            found = a[0] ^ a[1]
        elif operation == "lop3.b32":
            bits = [((a[0] >> i & 1) << 2) | ((a[1] >> i & 1) << 1) | (a[2] >> i & 1) for i in range(32)]
            found = sum((a[3] >> index & 1) << i for i, index in enumerate(bits))
        elif operation == "prmt.b32":
            pool = [(a[0] | a[1] << 32) >> 8 * i & 255 for i in range(8)]
            found = sum(pool[a[2] >> 4 * i & 7] << 8 * i for i in range(4))
        elif operation in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            dtype = torch.bfloat16 if "bf16" in operation else torch.float16
            x, y, z = (halves(n, dtype).double() for n in a)
            found = joined((x * y + z).to(dtype))
        else:
            raise AssertionError(f"unknown instruction: {line}")
        registers[target] = found & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


def packed(codes: list[int]) -> int:
    return sum(code << 8 * i for i, code in enumerate(codes))


def signed_bytes(register: int) -> list[int]:
    return [((register >> 8 * i & 255) ^ 128) - 128 for i in range(4)]


EVERY = [[(start + 37 * i) % 256 for i in range(4)] for start in range(256)]


def test_four_bits_become_sixteen_times_the_signed_code(sources: dict[str, str]) -> None:
    for codes in EVERY:
        low, high = executed(sources["UNPACK_4"], packed(codes), 2)
        assert signed_bytes(low) == [16 * ((c & 15) - 8) for c in codes]
        assert signed_bytes(high) == [16 * ((c >> 4) - 8) for c in codes]


def test_eight_bits_become_the_signed_code(sources: dict[str, str]) -> None:
    for codes in EVERY:
        assert signed_bytes(executed(sources["UNPACK_8"], packed(codes), 1)[0]) == [c - 128 for c in codes]


@pytest.mark.parametrize(("name", "dtype"), [("UNPACK_4_BF16", torch.bfloat16), ("UNPACK_4_FP16", torch.float16)])
def test_four_bits_become_sixteen_bit_numbers(sources: dict[str, str], name: str, dtype: torch.dtype) -> None:
    for codes in EVERY:
        found = torch.cat([halves(register, dtype) for register in executed(sources[name], packed(codes), 4)])
        assert found.tolist() == [(c & 15) - 8 for c in codes] + [(c >> 4) - 8 for c in codes]
