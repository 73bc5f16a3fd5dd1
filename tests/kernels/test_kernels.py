"""The integer path: the reference against exact sums, Triton's kernels (in its interpreter) against the reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from starquant.kernels import IntegerTokens, Prologue, TokenStates, dispatch, integer_linear, quantize_tokens, reference
from starquant.kernels.packing import pack
from starquant.numerics import PerToken, QuantFormat, dequantize, fake_quantize, quantize, state_indices


def tokens(rows: int, width: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    top = 1 << (bits - 1)
    return torch.randint(-top, top, (rows, width), generator=generator, dtype=torch.int8)


def stored(codes_OK: torch.Tensor, bits: int) -> torch.Tensor:
    unsigned = (codes_OK.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    return pack(unsigned) if bits <= 4 else unsigned


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_reference_is_the_exact_sum(bits: int) -> None:
    x, w = tokens(7, 40, 8), tokens(9, 40, bits, 1)
    codes = stored(w, bits)
    assert torch.equal(reference.weight_codes(codes, bits), w)
    sums = reference.accumulate(x, w)
    assert sums.dtype == torch.int32 and torch.equal(sums, (x.double() @ w.double().T).int())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_of_integers_is_the_fake_quantized_one(bits: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 32, generator=generator)
    w, bias = torch.randn(6, 32, generator=generator), torch.randn(6, generator=generator)
    grid = QuantFormat(bits, True, PerToken())
    solved = quantize(w, grid)
    codes = stored(solved.codes.to(torch.int8), bits)
    found = integer_linear(quantize_tokens(x, bits), codes, solved.scale, bits, bias)
    expected = torch.nn.functional.linear(fake_quantize(x, grid), dequantize(solved), bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip_S", [[0.5, 0.75], [[0.5, 0.9], [0.95, 0.6]]], ids=["one ratio", "one of each end"])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.8])
def test_token_codes_are_those_of_the_grid(clip_ratio: float, clip_S: list) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.cat((torch.randn(6, 24, generator=generator), torch.zeros(1, 24)))
    masked, clip_S = torch.arange(7) % 3 == 0, torch.tensor(clip_S)
    clip = torch.where(masked[:, None], *clip_S.view(2, -1))
    grid = QuantFormat(4, True, PerToken(), clip_ratio)
    solved = quantize(x, grid, clip=clip)
    found = quantize_tokens(x, 4, clip_ratio, Prologue(states=TokenStates(state_indices(masked), clip_S=clip_S)))
    assert torch.equal(found.codes, solved.codes.to(torch.int8)) and torch.equal(found.scale, solved.scale)


def test_a_device_without_the_tensor_cores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.validate_tensor_cores(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    with pytest.raises(
        dispatch.DeviceError, match=r"^Tesla V100: compute capability 7\.0 has no int8 tensor cores .*8\.0$"
    ):
        dispatch.validate_tensor_cores(torch.device("cuda"))


HERE = Path(__file__).parent


CHECKS = re.findall(r"^def check_(\w+)", (HERE / "run_kernels.py").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.skipif(find_spec("triton") is None, reason="the extra 'triton' is not installed")
@pytest.mark.parametrize(
    ("script", "verdict", "device", "checks"),
    [
        ("run_kernels.py", "all equal", "cpu", []),
        ("run_model.py", "all near", "cpu", []),
        # one by one: what a GPU runs is compiled first, for minutes
        *(pytest.param("run_kernels.py", "all equal", "cuda", [name], marks=pytest.mark.gpu) for name in CHECKS),
        pytest.param("run_model.py", "all near", "cuda", [], marks=pytest.mark.gpu),
    ],
)
def test_kernels_equal_the_reference(script: str, verdict: str, device: str, checks: list[str]) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    run = [sys.executable, str(HERE / script), device, *checks]
    done = subprocess.run(run, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == verdict


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="the extra 'triton' is not installed")
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, str(HERE / "compile_kernels.py")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.stdout.strip() == "all compiled", done.stdout[-2000:] + done.stderr[-4000:]


def test_empty_and_leading_dimensions() -> None:
    codes, scale = stored(tokens(3, 8, 4), 4), torch.ones(3, 1)
    none = IntegerTokens(torch.zeros(2, 0, 8, dtype=torch.int8), torch.ones(2, 0, 1), torch.float32)
    assert integer_linear(none, codes, scale, 4, None).shape == (2, 0, 3)


def test_rows_of_integer_tokens() -> None:
    """What an expert of a mixture reads of a shared site."""
    x = quantize_tokens(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4)), 8)
    x = IntegerTokens(x.codes, x.scale, x.dtype, (x.codes.float() @ torch.ones(8, 4), x.scale))
    for rows in (1, slice(0, 1), (torch.tensor([1, 0]), torch.tensor([2, 0])), torch.tensor([[True, False, True]] * 2)):
        some = x[rows]
        assert some.dtype == x.dtype and len(some.products) == 2
        for part, whole in zip((some.codes, some.scale, *some.products), (x.codes, x.scale, *x.products), strict=True):
            assert torch.equal(part, whole[rows])
