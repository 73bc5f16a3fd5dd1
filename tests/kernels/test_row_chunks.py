"""Products with packed weights in row chunks: the values and sums of the whole weight, which is never in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from starquant.diffusion import MaskPredictor, predictor
from starquant.kernels import (
    Affine,
    IntegerTokens,
    Kronecker,
    Prologue,
    TokenStates,
    integer_linear,
    quantize_tokens,
    reference,
    row_chunks,
    value_linear,
)
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.numerics import PerChannel, PerGroup, QuantFormat, dequantize, quantize, row_pieces
from starquant.quantized.packed_linear import PackedEmbedding, PackedLinear

#: Sizes of a chunk and of a piece, in numbers: whole weights, and several chunks and pieces of few rows with a rest.
WHOLE, SMALL = (2**22, 2**17), (40 * 7, 40 * 3)
FORMATS = [
    QuantFormat(4, True, PerChannel()),
    QuantFormat(4, False, PerGroup(8)),
    QuantFormat(3, True, PerGroup(20)),
    QuantFormat(2, False, PerChannel()),
    QuantFormat(5, True, PerChannel()),
    QuantFormat(8, True, PerChannel()),
    QuantFormat(8, False, PerGroup(8)),
]


def packed(fmt: QuantFormat, rows: int = 25, columns: int = 40, bias: bool = False) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return PackedLinear.from_linear(linear.requires_grad_(False), quantize(linear.weight.data, fmt), fmt)


def cut(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    monkeypatch.setattr(row_chunks, "PRODUCT", sizes[0])
    monkeypatch.setattr(row_pieces, "PIECE", sizes[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.mark.parametrize("sizes", [WHOLE, SMALL], ids=["whole", "pieces"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_values_are_those_of_the_whole_weight(
    fmt: QuantFormat, dtype: torch.dtype, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, sizes)
    linear = packed(fmt)
    out = torch.empty(25, 40, dtype=dtype)
    row_chunks.read_values(linear.codes, linear.scale, linear.zero, fmt.bits, out)
    assert torch.equal(out, dequantize(linear.quantized(), dtype))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_chunked_is_whole(fmt: QuantFormat, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = packed(fmt, bias=bias).to(dtype)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = dequantize(linear.quantized(), dtype)
    whole = F.linear(x, weight, linear.bias)
    with torch.inference_mode():
        assert torch.equal(linear(x), whole)  # one chunk: the same product
        cut(monkeypatch, SMALL)
        chunked = linear(x)
    exact = F.linear(x.double(), weight.double(), None if linear.bias is None else linear.bias.double())
    size = F.linear(x.double().abs(), weight.double().abs()) + 1
    assert chunked.dtype == dtype and chunked.shape == whole.shape
    assert bool(((chunked.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * size).all())


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_sums_of_integers_are_exact_in_chunks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = packed(QuantFormat(bits, True, PerChannel()), bias=True)
    x = quantize_tokens(torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)), 8)
    rows, scale = x.codes.flatten(0, 1), x.scale.flatten(0, 1)
    sums = (rows.double() @ linear.quantized().codes.double().T).int()
    expected = reference.scaled(sums, scale, linear.scale[:, 0], linear.bias, torch.float32)
    for sizes in (WHOLE, SMALL):
        cut(monkeypatch, sizes)
        assert torch.equal(linear(x), expected.view(2, 3, 25))


@pytest.mark.parametrize("kind", ["plain", "states", "kronecker", "affine"])
def test_tokens_are_quantized_alike_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    x, state = torch.randn(3, 7, 24, generator=generator), torch.arange(21).view(3, 7) % 3 // 2
    states = TokenStates(state, 3, 2, torch.tensor([0.5, 0.75]))
    prologue = {
        "plain": Prologue(),
        "states": Prologue(states=states),
        "kronecker": Prologue(kronecker=Kronecker(*(torch.randn(n, n, generator=generator) for n in (4, 6)))),
        "affine": Prologue(Affine.of(torch.randn(3, 8, 8, generator=generator), torch.randn(3, 8)), states=states),
    }[kind]
    whole = quantize_tokens(x, 4, 0.9, prologue)
    cut(monkeypatch, (1, 24 * 4))
    pieces = quantize_tokens(x, 4, 0.9, prologue)
    torch.testing.assert_close(pieces.scale, whole.scale, rtol=1e-6, atol=0)
    assert int((pieces.codes.int() - whole.codes.int()).abs().max()) <= (kind in ("kronecker", "affine"))
    assert kind in ("kronecker", "affine") or torch.equal(pieces.scale, whole.scale)


class Largest(TorchDispatchMode):
    """The most bytes of one memory that operations wrote, except for those that were there before.

    Args:
        known: tensors that were.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_more_than_a_chunk_is_unpacked(bits: int, integers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a model in small: 4,096 rows of 64, chunks of 128 rows, 2 tokens."""
    monkeypatch.setattr(row_chunks, "PRODUCT", 64 * 128)
    linear = packed(QuantFormat(bits, True, PerChannel()), 4096, 64)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    tokens: Tensor | IntegerTokens = quantize_tokens(x, 8) if integers else x
    with torch.inference_mode(), Largest(*linear.buffers(), x) as largest:
        y = linear(tokens)
    assert y.nbytes == 4 * 2 * 4096
    assert largest.bytes == max(y.nbytes, (1 if integers else 4) * 64 * 128)


def test_a_packed_embedding_reads_the_rows_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = QuantFormat(8, True, PerChannel())
    table = nn.Embedding(4096, 64)
    embedding = PackedEmbedding.like(table, fmt)
    embedding.keep(quantize(table.weight.data, fmt))
    ids = torch.tensor([[5, 4095, 5], [0, 1, 2]])
    cut(monkeypatch, (1, 2 * 64))
    with Largest(*embedding.buffers(), ids) as largest:
        rows = embedding(ids)
    assert torch.equal(rows, dequantize(embedding.quantized())[ids]) and largest.bytes == rows.nbytes == 4 * 6 * 64
    assert embedding(ids[:, :0]).shape == (2, 0, 64)


def test_gradients_pass_to_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is called outside of inference mode keeps no unpacked weights for a backward pass."""
    linear = packed(QuantFormat(4, False, PerGroup(8)), bias=True)
    cut(monkeypatch, SMALL)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    upstream = torch.randn(2, 3, 25, generator=torch.Generator().manual_seed(2))
    y = linear(x)
    expected = F.linear(x, dequantize(linear.quantized()), linear.bias)
    torch.testing.assert_close(y, expected)
    (gradient,), (whole,) = (torch.autograd.grad(out, x, upstream) for out in (y, expected))
    torch.testing.assert_close(gradient, whole)


def test_no_tokens_and_leading_dimensions() -> None:
    linear = packed(FORMATS[0])
    assert linear(torch.zeros(2, 0, 40)).shape == (2, 0, 25)
    assert linear(torch.zeros(40)).shape == (25,)
    transposed = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).T
    assert torch.equal(linear(transposed), linear(transposed.contiguous()))


def test_positions_share_one_unpacking_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "mlp_hidden_size": 48, "vocab_size": 200}
    torch.manual_seed(0)
    model = LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=199, eos_token_id=198)).eval()
    monkeypatch.setattr(predictor, "_ELEMENTS", {"cpu": 200 * 4})
    ids, positions = torch.full((1, 300), 199), (torch.zeros(300, dtype=torch.long), torch.arange(300))

    def chunks() -> list[Tensor]:
        return [logits_NV for _, logits_NV in MaskPredictor(model).chunks(ids, positions)]

    assert {len(part) for part in chunks()} == {4}
    head, fmt = model.trunk().head, QuantFormat(8, True, PerChannel())
    assert head is not None
    model.model.transformer["ff_out"] = PackedLinear.from_linear(head, quantize(head.weight.data, fmt), fmt)
    parts = chunks()
    assert [len(part) for part in parts] == [256, 44]
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat(parts), model(ids).logits[0])


def test_the_op_is_what_compilation_sees() -> None:
    linear = packed(FORMATS[1], bias=True)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    arguments = (x, linear.codes, linear.scale, linear.zero, 4, linear.bias)
    torch.library.opcheck(torch.ops.starquant.value_linear.default, arguments)
    assert torch.equal(torch.ops.starquant.value_linear(*arguments), value_linear(*arguments))


def test_integer_products_of_experts_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = packed(FORMATS[0])
    x = quantize_tokens(torch.randn(5, 40, generator=torch.Generator().manual_seed(1)), 8)
    cut(monkeypatch, SMALL)
    some = x[torch.tensor([4, 1])]
    y = integer_linear(some, linear.codes, linear.scale, 4, None)
    assert torch.equal(y, linear(x)[torch.tensor([4, 1])])
