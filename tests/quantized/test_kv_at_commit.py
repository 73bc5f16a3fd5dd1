"""Keys and values rounded at commit: who reads what, with and without kept keys, in every layout and when packed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from starquant.config.bits import AttentionSpec, BitsSpec
from starquant.diffusion import LLaDA2Sampler, LLaDA21Sampler, SDARSampler, generate
from starquant.diffusion.samplers import BlockSampler
from starquant.errors import CheckpointError, ConfigError
from starquant.methods.rtn import RTN
from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import Context
from starquant.models.layers import RotaryAttention
from starquant.numerics import fake_quantize
from starquant.packed.description import describe, rebuild
from starquant.quantized import QuantizedAttentionCore
from starquant.quantized.attention import KeyValueGrid, operand_format
from starquant.quantized.install import install
from tests.support.methods import fitted_once, method_named
from tests.support.models import fresh, logits
from tests.support.paths import GOLDEN
from tests.support.specs import spec

MASKS = {"sdar_gqa": 300, "llada2_moe_a": 390}


def bits_of(width: int, at: str, *more: str) -> BitsSpec:
    operands = f"bits.attention.k={width}", f"bits.attention.v={width}"
    return spec("bits=w16a16", *operands, f"bits.attention.kv_at={at}", *more).bits


def quantized(folder: str, bits: BitsSpec) -> MaskedDiffusionModel:
    model = load_model(GOLDEN / folder)
    install(model, bits)
    return model


def prompts(rows: int, length: int = 10) -> Tensor:
    return torch.randint(0, 290, (rows, length), generator=torch.Generator().manual_seed(7))


CASES: list[tuple[str, type[BlockSampler], dict[str, Any]]] = [
    ("sdar_gqa", SDARSampler, {"gen_length": 22, "block_length": 4, "stop_ids": ()}),
    ("sdar_gqa", SDARSampler, {"gen_length": 22, "block_length": 8, "remasking": "low_confidence_dynamic"}),
    ("llada2_moe_a", LLaDA2Sampler, {"gen_length": 22, "block_length": 8, "threshold": 0.5}),
    ("llada2_moe_a", LLaDA21Sampler, {"gen_length": 22, "block_length": 8, "threshold": 0.4, "editing_threshold": 0.3}),
]


@pytest.mark.parametrize(("folder", "sampler", "settings"), CASES)
@pytest.mark.parametrize("width", [8, 4])
def test_kept_keys_change_no_token(folder: str, sampler: Any, settings: dict[str, Any], width: int) -> None:
    """Every row alone and both together; at 4 bits a rounding is seen, and so is when it is done."""
    made = {}
    for at in ("commit", "read"):
        model = quantized(folder, bits_of(width, at))
        kept, whole = (generate(model, prompts(2), sampler(**settings, cache=cache)) for cache in (True, False))
        assert torch.equal(kept, whole)
        made[at] = kept
        for row in range(2):
            alone = generate(model, prompts(2)[row : row + 1], sampler(**settings))
            assert torch.equal(alone[0], kept[row])
    if width == 4:
        assert not torch.equal(made["commit"], made["read"])


def random_operands(length: int = 15) -> tuple[RotaryAttention, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, heads * 8) for heads in (4, 2, 2))
    return RotaryAttention(4, 2, 8), (q, k, v)


def contexts(length: int, block: int) -> Iterator[tuple[str, Context, Tensor]]:
    """Layouts of a model of blocks, and the block of every token: that of another copy is another one."""
    model = load_model(GOLDEN / "sdar_gqa")
    model.block_length = block
    ids = prompts(2, length)
    yield "plain", model.context(ids), torch.arange(length)[None].expand(2, -1) // block
    visible = torch.ones_like(ids, dtype=torch.bool)
    visible[1, :4] = False
    yield "padded", model.context(ids, visible), (visible.cumsum(1) - 1).clamp_min(0) // block
    half = length // 2
    positions = torch.cat((torch.arange(half), torch.arange(length - half)))[None].expand(2, -1)
    yield (
        "noisy and clean",
        model.context(ids, None, positions),
        positions // block + 100 * (torch.arange(length) < half),
    )


@pytest.mark.parametrize("block", [1, 4, 20])
def test_attention_is_that_of_a_plain_loop(block: int) -> None:
    """A query reads its own block's keys and values as they are, all others that it sees rounded."""
    length, grid = 15, KeyValueGrid(False, 0.9)
    attention, (q, k, v) = random_operands(length)
    bits = {"q": 4, "k": 4, "p": 16, "v": 8}
    for name, context, block_BL in contexts(length, block):
        core = QuantizedAttentionCore(bits, kv=grid, kv_at="commit")
        attention.core = core
        context.rotary = torch.ones(1, 1, length, 8), torch.zeros(1, 1, length, 8)  # nothing turns
        got = attention(q, k, v, context)
        mask = context.mask.expand(2, 1, length, length)
        for b, h, i in itertools.product(range(2), range(4), range(length)):
            kv = slice(8 * (h // 2), 8 * (h // 2) + 8)
            query = fake_quantize(q[b, i, 8 * h : 8 * h + 8][None], operand_format("q", 4))[0]
            seen = [j for j in range(length) if mask[b, 0, i, j]]
            keys, values = [], []
            for j in seen:
                own = block_BL[b, j] == block_BL[b, i]
                pair = k[b, j, kv], v[b, j, kv]
                if not own:
                    pair = tuple(
                        fake_quantize(x[None], operand_format(o, bits[o], grid))[0]
                        for o, x in zip("kv", pair, strict=True)
                    )
                keys.append(pair[0])
                values.append(pair[1])
            weights = (torch.stack(keys) @ query / math.sqrt(8)).softmax(0)
            want = weights @ torch.stack(values)
            assert torch.allclose(got[b, i, 8 * h : 8 * h + 8], want, atol=1e-5), (name, b, h, i)


@pytest.mark.parametrize("probabilities", [16, 8])
def test_at_16_bits_it_is_the_attention_that_it_was(probabilities: int) -> None:
    attention, (q, k, v) = random_operands()
    for _, context, _ in contexts(15, 4):
        found = []
        for at in ("read", "commit"):
            attention.core = QuantizedAttentionCore({"q": 16, "k": 16, "p": probabilities, "v": 16}, kv_at=at)
            context.rotary = torch.ones(1, 1, 15, 8), torch.zeros(1, 1, 15, 8)
            found.append(attention(q, k, v, context))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("folder", MASKS)
def test_the_layout_of_training_is_the_passes_that_it_stands_for(folder: str) -> None:
    model = quantized(folder, bits_of(4, "commit"))
    model.block_length = 4
    clean = prompts(1, 14)
    noisy = clean.clone()
    noisy[0, [1, 5, 6, 9, 12]] = MASKS[folder]
    positions = torch.arange(14)[None].repeat(1, 2)
    together = model(torch.cat((noisy, clean), 1), position_ids=positions).logits[0, :14]
    for begin in range(0, 14, 4):
        apart = logits(model, torch.cat((clean[:, :begin], noisy[:, begin : begin + 4]), 1))[0, begin:]
        torch.testing.assert_close(together[begin : begin + 4], apart, rtol=1e-3, atol=1e-4)
    at_read = quantized(folder, bits_of(4, "read"))
    at_read.block_length = 4
    assert not torch.allclose(logits(at_read, noisy[:, :4]), together[:4], atol=1e-2)
    full = load_model(GOLDEN / folder)
    torch.testing.assert_close(logits(full, noisy[:, :4])[0], together[:4], rtol=1e-3, atol=1e-4)  # nothing is read


@torch.no_grad()
def test_rounded_once_read_many_times() -> None:
    """What is kept lies on the grid, and no pass over a block rounds keys again."""
    model = quantized("sdar_gqa", bits_of(4, "commit"))
    core = model.block_sites(model.trunk().blocks[0]).attention.core
    rounded: list[int] = []
    quantize = core._quantize
    core._quantize = lambda name, x: (rounded.append(x.shape[2]) if name == "k" else None, quantize(name, x))[1]
    generate(model, prompts(1, 8), SDARSampler(24, 4, stop_ids=()))
    assert rounded == [12, 8, 8, 8, 8, 8]  # with the first pass of each next block; one that is kept, one that is not


@torch.no_grad()
@pytest.mark.parametrize("at", ["16 bits", "read", "commit"])
@pytest.mark.parametrize("folder", MASKS)
def test_a_block_is_kept_by_the_next_ones_first_pass_as_by_one_of_its_own(folder: str, at: str) -> None:
    """The same keys, values and logits, whether buffers have room from the start or grow."""
    model = load_model(GOLDEN / folder) if at == "16 bits" else quantized(folder, bits_of(4, at))
    model.block_length = 4
    ids = prompts(2, 16)
    ids[:, 13:] = MASKS[folder]
    layer = model.block_sites(model.trunk().blocks[-1]).attention
    together, apart = model.committed_cache(), model.committed_cache(16)
    for cache in (together, apart):
        cache.ahead(8, 12)
        model(ids[:, :12], cache=cache)
    apart.ahead(12, 16)  # a pass that is there to keep the finished block: what stands behind it does not matter
    model(torch.cat((ids[:, :12], ids[:, :4]), 1), cache=apart)
    logits_of = []
    for cache in (together, apart):
        cache.ahead(12, 16)
        assert cache.window == (slice(8, 16) if cache is together else slice(12, 16))
        logits_of.append(model(ids, cache=cache).logits[:, -4:])
    torch.testing.assert_close(*logits_of, rtol=1e-4, atol=1e-4)
    for one, other in zip(together.kept(layer), apart.kept(layer), strict=True):
        assert one.shape[2] == 12
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of[0], model(ids).logits[:, -4:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["rtn", "quarot", "gptq", "flatquant", "star_quant_plus", "dllmquant_plus_plus"])
@pytest.mark.parametrize("architecture", ["sdar", "llada2"])
def test_methods_fit_and_run_with_it(architecture: str, name: str) -> None:
    """Transforms of queries and keys, clips and static scales stand in front of what is kept."""
    four = ("bits=w4a4", "bits.attention.v=4", "bits.attention.k=4", "bits.attention.kv_at=commit")
    method, bits = method_named(name, *four)
    made = []
    for at in ("commit", "read"):
        model = fresh(architecture)
        bits = bits.model_copy(update={"attention": bits.attention.model_copy(update={"kv_at": at})})
        method.apply(model, fitted_once(name, architecture), bits)
        sampler = SDARSampler if architecture == "sdar" else LLaDA2Sampler
        kept, whole = (generate(model, prompts(1, 6) % 110, sampler(14, 4, cache=cache)) for cache in (True, False))
        assert torch.equal(kept, whole)
        ids = prompts(2, 16) % 110
        ids[:, 13:] = model.mask_token_id
        made.append(logits(model, ids))
    assert not torch.allclose(made[0], made[1])


def test_a_packed_description_keeps_it() -> None:
    model = quantized("sdar_gqa", bits_of(4, "commit"))
    described = describe(model)
    again = load_model(GOLDEN / "sdar_gqa")
    rebuild(again, described)
    ids = prompts(2, 12)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert not torch.equal(logits(quantized("sdar_gqa", bits_of(4, "read")), ids), logits(model, ids))
    assert "kv_at" not in str(describe(quantized("sdar_gqa", bits_of(4, "read"))))
    with pytest.raises(CheckpointError, match="kv_at: got commit, allowed: read"):
        name = "model.transformer.blocks.0.attention.core"
        described = {name: next(iter(described.values()))}
        rebuild(load_model(GOLDEN / "llada_mha"), described)


def test_where_nothing_is_committed_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bits\.attention\.kv_at: got commit, but LLaDAModelLM is bidirectional"):
        RTN(spec("method=rtn").method).fit(load_model(GOLDEN / "llada_mha"), bits_of(4, "commit"))
    with pytest.raises(ConfigError, match=r"kv_at: got commit with k=16, v=16, allowed: read"):
        spec("bits=w4a4", "bits.attention.kv_at=commit")
    with pytest.raises(ConfigError, match=r"bits\.attention\.kv_at: got 'late', allowed: read, commit"):
        spec("bits=w4a4", "bits.attention.kv_at=late")


def test_only_where_it_is_chosen_is_it_another_run() -> None:
    four = AttentionSpec(k=4, v=4)
    assert "kv_at" not in four.identity()
    assert AttentionSpec(k=4, kv_at="commit").identity()["kv_at"] == "commit"
    runs = [
        spec("method=rtn", "bits=w4a4", "bits.attention.k=4", *more) for more in ((), ("bits.attention.kv_at=commit",))
    ]
    assert runs[0].digest() != runs[1].digest()
