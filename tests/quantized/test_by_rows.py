"""What is done a few rows at a time is what is done at once, and takes the memory of a few rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from starquant.models.layers import RMSNorm
from starquant.numerics import QuantFormat, SqnrMeter, dequantize, quantize, random_rotation, sqnr_db
from starquant.numerics.chunks import CHUNK, row_slices
from starquant.numerics.formats import PerChannel, PerGroup
from starquant.quantized import fake_quant_linear, install, rewriting
from starquant.quantized.fake_quant_linear import FakeQuantLinear
from starquant.quantized.packed_linear import PackedLinear
from tests.support.memory import peak_bytes
from tests.support.models import fresh
from tests.support.specs import spec

FEW = 100  # numbers a chunk: 3 rows of 32


def _linear(outputs: int = 48, inputs: int = 32, dtype: torch.dtype = torch.float64) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(torch.randn(outputs, inputs, generator=generator))
    return linear


def _fold(linear: nn.Linear) -> None:
    norm = RMSNorm(32, eps=1e-6).double().requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2.0, 32))
    rewriting.fold_gain(norm, [linear])


REWRITINGS: dict[str, Callable[[nn.Linear], None]] = {
    "fold_gain": _fold,
    "rotate_input": lambda linear: rewriting.rotate_input([linear], random_rotation("hadamard", 32, 0)),
    "rotate_output": lambda linear: rewriting.rotate_output(linear, random_rotation("orthogonal", 48, 0)),
    "divide_output": lambda linear: rewriting.divide_output(linear, torch.linspace(0.5, 2.0, 48)),
    "hadamard_heads_output": lambda linear: rewriting.hadamard_heads_output(linear, 3),
    "hadamard_across_heads_input": lambda linear: rewriting.hadamard_across_heads_input(linear, 4),
}


@pytest.mark.parametrize("name", REWRITINGS)
def test_rewritings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = _linear(), _linear()
    before = whole.weight.clone()
    REWRITINGS[name](whole)
    monkeypatch.setattr(rewriting, "row_slices", functools.partial(row_slices, numbers=FEW))
    REWRITINGS[name](parts)
    assert torch.allclose(parts.weight, whole.weight, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(whole.weight, before)


@pytest.mark.parametrize("packed", [False, True])
def test_tables_are_quantized_as_if_at_once(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "row_slices", functools.partial(row_slices, numbers=FEW))
    model, bits = fresh("llada_gqa"), spec("bits=w4a4", "bits.embedding=8", "bits.head=8").bits
    tables = [model.trunk().embedding.weight.clone(), model.trunk().head.weight.clone()]  # type: ignore[union-attr]
    entries = [entry for entry in install.install(model, bits, packed=packed) if entry.kind in ("embedding", "head")]
    grid = QuantFormat(8, True, PerChannel())
    for module, table, entry in zip((model.trunk().embedding, model.trunk().head), tables, entries, strict=True):
        expected = dequantize(quantize(table, grid), table.dtype)
        got = dequantize(module.quantized(), table.dtype) if packed else module.weight  # type: ignore[union-attr, operator]
        assert torch.equal(got, expected)
        assert entry.weight_sqnr_db == pytest.approx(sqnr_db(table, expected), rel=1e-9)


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(8)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_written_as_if_at_once(
    granularity: PerChannel | PerGroup, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_quant_linear, "row_slices", functools.partial(row_slices, numbers=FEW))
    linear, fmt = _linear(dtype=torch.bfloat16), QuantFormat(4, symmetric, granularity)
    codes = quantize(linear.weight, fmt)
    expected = dequantize(codes, torch.bfloat16)
    assert torch.equal(dequantize(PackedLinear.from_linear(linear, codes, fmt).quantized(), torch.bfloat16), expected)
    assert torch.equal(FakeQuantLinear.from_linear(linear, codes, fmt).weight, expected)


def test_ratios_are_those_of_the_whole() -> None:
    x = torch.randn(50, 300_000)
    y = (x * 8).round() / 8
    assert len(list(row_slices(x))) > 1
    signal, noise = x.double().square().sum(), (x - y).double().square().sum()
    assert sqnr_db(x, y) == pytest.approx(float(10 * torch.log10(signal / noise)), rel=1e-9)
    one, each = SqnrMeter(), SqnrMeter()
    one.update(torch.tensor(3.0), torch.tensor(2.5))
    each.update(torch.tensor([3.0]), torch.tensor([2.5]))
    assert one.value() == each.value()


@pytest.mark.parametrize("x", [torch.empty(7, 40), torch.empty(3, 1000), torch.empty(0, 5), torch.empty(9)])
def test_slices_cover_every_row_once(x: Tensor) -> None:
    rows = [i for part in row_slices(x, 100) for i in range(part.start, part.stop)]
    assert rows == list(range(len(x)))
    assert all(x[part].numel() <= max(100, x[:1].numel()) for part in row_slices(x, 100))


def test_a_table_takes_the_memory_of_some_rows() -> None:
    """8,192 x 4,096 numbers would be 256 MB in float64, several times over."""
    linear = nn.Linear(4096, 8192, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    rotation = random_rotation("hadamard", 4096, 0)
    assert peak_bytes(lambda: rewriting.rotate_input([linear], rotation)) < 5 * 8 * CHUNK
    assert peak_bytes(lambda: rewriting.rotate_output(linear, random_rotation("hadamard", 8192, 0))) < 5 * 8 * CHUNK
