"""Compare every Triton kernel with the reference; run by test_kernels.py, or by hand: `python run_kernels.py cuda`."""

from __future__ import annotations

import itertools
import sys

import torch

from starquant.kernels import Affine, Before, Gate, reference
from starquant.kernels.triton_linear import linear, linear_16
from starquant.kernels.triton_quantize import quantize_rows

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"


def check_linear() -> None:
    """int32 sums (scales of one, so that the output is the sum), then scales and bias; odd shapes, several tiles."""
    shapes = [(1, 3, 8), (17, 70, 24), (130, 130, 264), (5, 64, 256)]
    for (rows, outputs, width), bits in itertools.product(shapes, (3, 4, 8)):
        generator = torch.Generator().manual_seed(rows + bits)
        top = 1 << (bits - 1)
        x = torch.randint(-8, 8, (rows, width), generator=generator, dtype=torch.int8).to(DEVICE)
        w = torch.randint(0, 2 * top, (outputs, width), generator=generator, dtype=torch.uint8).to(DEVICE)
        codes = w[:, : width // 2] | (w[:, width // 2 :] << 4) if bits <= 4 else w
        ones = torch.ones(rows, 1, device=DEVICE), torch.ones(outputs, device=DEVICE)
        sums = reference.accumulate(x, reference.weight_codes(codes, bits))
        found = linear(x, ones[0], codes, ones[1], bits, None, torch.float32)  # below 2^24: exact in float32
        assert torch.equal(found, sums.float()), ("sums", rows, outputs, width, bits)
        token, channel = (torch.rand(n, generator=generator).to(DEVICE) for n in (rows, outputs))
        bias = torch.randn(outputs, generator=generator).to(DEVICE)
        found = linear(x, token[:, None], codes, channel, bits, bias, torch.float32)
        expected = reference.scaled(sums, token[:, None], channel, bias, torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        values = torch.randn(rows, width, generator=generator).to(DEVICE, torch.float16)
        expected = values.float() @ (reference.weight_codes(codes, bits).float() * channel[:, None]).T + bias
        found = linear_16(values, codes, channel, bits, bias).float()
        assert float((found - expected).norm() / expected.norm()) < 2e-3, ("16 bits", rows, outputs, width, bits)


def check_quantize() -> None:
    """Codes and scales, with clip ratios and gates, of widths that are no power of two."""
    for width, bits, dtype in itertools.product((8, 160, 300), (4, 8), (torch.float32, torch.bfloat16)):
        generator = torch.Generator().manual_seed(width)
        x = torch.cat((torch.randn(9, width, generator=generator), torch.zeros(1, width))).to(DEVICE, dtype)
        clip = torch.linspace(0.5, 1.0, 10, device=DEVICE)[:, None]
        for ratios, clip_ratio in ((None, 1.0), (clip, 0.9)):
            codes, scale = quantize_rows(x, bits, ratios, clip_ratio)
            expected = reference.quantize_rows(x, bits, ratios, clip_ratio)
            assert torch.equal(scale, expected[1]), ("scale", width, bits, dtype)
            assert torch.equal(codes, expected[0]), ("codes", width, bits, dtype)
        masked, d_m, d_u = torch.arange(10, device=DEVICE) % 2 == 0, width // 4, width // 8
        gated = x.clone()
        gated[masked, width - d_u :] = 0
        gated[~masked, width - d_m - d_u : width - d_u] = 0
        before = Before(gate=Gate(masked, d_m, d_u))
        codes, scale = quantize_rows(x, bits, before=before)
        expected = reference.quantize_rows(gated, bits)
        told = reference.quantize_rows(x, bits, before=before)
        assert torch.equal(told[0], expected[0]) and torch.equal(told[1], expected[1])
        assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1]), ("gate", width, bits, dtype)


def check_affine() -> None:
    """TAC in the same pass: sums of a run in another order, so that a code may fall to the other side of an edge."""
    for width, size, dtype in ((64, 8, torch.float32), (96, 16, torch.float32), (320, 4, torch.bfloat16)):
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(7, width, generator=generator).to(DEVICE, dtype)
        matrix = torch.eye(size) + 0.1 * torch.randn(width // size, size, size, generator=generator)
        shift = 0.1 * torch.randn(width // size, size, generator=generator)
        affine = Affine(matrix.to(DEVICE), shift.to(DEVICE))
        before = Before(affine, Gate(torch.arange(7, device=DEVICE) % 2 == 0, size, size))
        codes, scale = quantize_rows(x, 4, before=before)
        expected = reference.quantize_rows(x, 4, before=before)
        torch.testing.assert_close(scale, expected[1], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
        apart = (codes.int() - expected[0].int()).abs()
        assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.01, ("affine", width, size)


if __name__ == "__main__":
    check_linear()
    check_quantize()
    check_affine()
    print("all equal")
