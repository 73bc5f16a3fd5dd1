"""The one mutation: what is touched, what is reported, and that the numbers are those of the grids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from starquant.config.bits import ActivationSpec, AttentionSpec, BitsSpec, WeightSpec
from starquant.config.methods.rtn import RTNOptions
from starquant.errors import CheckpointError, ConfigError
from starquant.methods.base import Fitted
from starquant.methods.rtn import RTN
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.numerics import PerChannel, PerToken, QuantFormat, fake_quantize, sqnr_db
from starquant.quantized import FakeQuantLinear, QuantizedAttentionCore
from starquant.quantized.attention import KeyValueGrid, probabilities
from starquant.quantized.install import install
from starquant.quantized.probe import measure_operands


def bits(w: int, a: int, **more) -> BitsSpec:
    return BitsSpec(name="test", weights=WeightSpec(bits=w), activations=ActivationSpec(bits=a), **more)


def logits(model, ids=None) -> torch.Tensor:
    ids = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(0)) if ids is None else ids
    with torch.inference_mode():
        return model(ids).logits


def test_exactly_the_declared_linears_change(golden_model) -> None:
    before = {name: p.clone() for name, p in golden_model.state_dict().items()}
    declared = {f"{name}.weight" for name in golden_model.linears()}
    manifest = install(golden_model, bits(4, 4))
    after = golden_model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == declared
    assert list(after) == list(before)
    fakes = {f"{n}.weight" for n, m in golden_model.named_modules() if isinstance(m, FakeQuantLinear)}
    assert fakes == declared
    assert {f"{e.name}.weight" for e in manifest if e.kind == "linear"} == declared


def test_down_projections_are_quantized_and_the_head_is_not(golden_model) -> None:
    """The name `ff_out` is both in LLaDA: a filter on it leaves every down-projection at 16 bits."""
    manifest = install(golden_model, bits(4, 4))
    down = [e for e in manifest if e.role == "down_proj"]
    assert len(down) == 3
    assert all(e.weight_bits == 4 and e.reason is None for e in down)
    (head,) = [e for e in manifest if e.kind == "head"]
    assert (head.weight_bits, head.reason) == (16, "bits.head = 16")


def test_weights_are_rounded_per_output_channel(golden_model) -> None:
    originals = {name: info.module.weight.clone() for name, info in golden_model.linears().items()}
    manifest = {e.name: e for e in install(golden_model, bits(3, 16))}
    for name, weight in originals.items():
        expected = fake_quantize(weight, QuantFormat(3, True, PerChannel()))
        assert torch.equal(golden_model.get_submodule(name).weight, expected)
        assert manifest[name].weight_sqnr_db == pytest.approx(sqnr_db(weight, expected))


def test_activations_are_rounded_per_token_before_each_group(golden_model) -> None:
    """Hooks see on-grid inputs at every declared linear."""
    install(golden_model, bits(16, 4))
    seen = {}
    for name, info in golden_model.linears().items():
        info.module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    logits(golden_model)
    assert len(seen) == 21
    for name, x in seen.items():
        assert torch.allclose(x, fake_quantize(x, QuantFormat(4, True, PerToken())), atol=1e-5), name
        assert max(len(row.unique()) for row in x.flatten(0, 1)) <= 16


def test_16_bits_change_nothing(golden_model) -> None:
    before = logits(golden_model)
    manifest = RTN(RTNOptions(name="rtn")).apply(golden_model, Fitted(), bits(16, 16))
    assert torch.equal(logits(golden_model), before)
    assert all(e.reason for e in manifest)


def test_more_bits_lose_less(family: str) -> None:
    from starquant.models import load_model
    from tests.support.paths import GOLDEN

    exact = logits(load_model(GOLDEN / family))
    quality = []
    for width in (3, 4, 8):
        model = load_model(GOLDEN / family)
        install(model, bits(width, width))
        quality.append(sqnr_db(exact, logits(model)))
    assert quality[0] < quality[1] < quality[2]
    assert quality[2] > 20.0


def test_manifest_names_everything_once(golden_model) -> None:
    manifest = install(golden_model, bits(4, 4, attention=AttentionSpec(p=4, v=4)))
    assert len({e.name for e in manifest}) == len(manifest) == 1 + 21 + 3 * 4 + 1
    for entry in manifest:
        quantized = min(entry.weight_bits or 16, entry.activation_bits or 16) < 16
        assert quantized == (entry.reason is None), entry


def test_probe_fills_in_what_activations_lose(golden_model) -> None:
    plan = bits(4, 4, attention=AttentionSpec(q=8, p=4, v=4))
    manifest = measure_operands(golden_model, install(golden_model, plan))
    for entry in manifest:
        measured = entry.activation_sqnr_db is not None
        assert measured == ((entry.activation_bits or 16) < 16), entry
    by_role = {e.role: e.activation_sqnr_db for e in manifest if e.block == 0}
    assert by_role["q"] > by_role["v"] > 5.0
    again = measure_operands(golden_model, manifest)
    assert again == manifest  # meters are reset, the probe is seeded


@pytest.mark.parametrize("padded", [False, True])
def test_attention_operands_against_explicit_loops(padded: bool) -> None:
    """Q, K, P, V rounded per token and head, K and V shared by the query heads of their group."""
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    if padded:
        mask[1, ..., :2] = False
    core = QuantizedAttentionCore({"q": 8, "k": 4, "p": 4, "v": 3})
    out = core(q, k, v, mask if padded else None)
    for b in range(2):
        for h in range(6):
            q8 = fake_quantize(q[b, h], QuantFormat(8, True, PerToken()))
            k4 = fake_quantize(k[b, h // 3], QuantFormat(4, True, PerToken()))
            v3 = fake_quantize(v[b, h // 3], QuantFormat(3, True, PerToken()))
            scores = (q8 @ k4.T / 8**0.5).masked_fill(~mask[b, 0], -torch.inf)
            p = scores.softmax(-1)
            step = p.amax(-1, keepdim=True) / 15
            assert torch.allclose(out[b, h], (torch.round(p / step) * step) @ v3, atol=1e-5)


def test_the_grid_of_keys_and_values() -> None:
    """Asymmetric and clipped, as QuaRot's authors have it; Q and P stay on grids of their own."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 1, 5, 8) + 2.0 for _ in range(3))
    own = QuantizedAttentionCore(dict.fromkeys("qkpv", 4), kv=KeyValueGrid(False, 0.95))
    rounded = [QuantFormat(4, True, PerToken()), *[QuantFormat(4, False, PerToken(), 0.95)] * 2]
    exact = [fake_quantize(x, fmt) for x, fmt in zip((q, k, v), rounded, strict=True)]
    only_p = QuantizedAttentionCore({"q": 16, "k": 16, "p": 4, "v": 16})
    assert torch.equal(own(q, k, v, None), only_p(*exact, None))
    # a handed transform or scale does not lose the grid
    assert own.kv == KeyValueGrid(False, 0.95)


def test_probabilities_at_16_bits_agree_with_full_attention(golden_model) -> None:
    before = logits(golden_model)
    install(golden_model, bits(16, 16, attention=AttentionSpec(q=8, k=8, v=8)))
    assert sqnr_db(before, logits(golden_model)) > 20.0
    assert isinstance(golden_model.block_sites(golden_model.trunk().blocks[0]).attention.core, QuantizedAttentionCore)


def test_embedding_and_head_when_asked(golden_model) -> None:
    embedding = golden_model.trunk().embedding.weight.clone()
    manifest = {e.kind: e for e in install(golden_model, bits(16, 16, embedding=8, head=8))}
    expected = fake_quantize(embedding, QuantFormat(8, True, PerChannel()))
    assert torch.equal(golden_model.trunk().embedding.weight, expected)
    assert manifest["embedding"].weight_sqnr_db > 35.0
    assert manifest["head"].weight_sqnr_db > 35.0


def _tied() -> LLaDAModelLM:
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 64}
    return LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=3, weight_tying=True))


def _tied_dream() -> DreamModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return DreamModel(DreamConfig(**sizes, vocab_size=64, mask_token_id=3, tie_word_embeddings=True))


@pytest.mark.parametrize("make", [_tied, _tied_dream])
def test_tied_head_follows_the_embedding(make: Callable[[], MaskedDiffusionModel]) -> None:
    with pytest.raises(ConfigError, match=r"bits\.head: got 8, but the head is tied"):
        install(make(), bits(4, 4, head=8))
    manifest = install(make(), bits(4, 4, head=8, embedding=8))
    assert manifest[-1].kind == "head"
    assert manifest[-1].reason == "tied to the embedding"


def test_groups_must_divide_and_nothing_is_changed_before_that_is_known(golden_model) -> None:
    before = logits(golden_model)
    plan = BitsSpec(name="g", weights=WeightSpec(bits=4, group_size=48), activations=ActivationSpec(bits=16))
    with pytest.raises(ConfigError, match=r"bits\.weights\.group_size: got 48, which does not divide"):
        install(golden_model, plan)
    assert torch.equal(logits(golden_model), before)


def test_non_finite_weights_are_named(golden_model) -> None:
    name, info = next(iter(golden_model.linears().items()))
    info.module.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        install(golden_model, bits(4, 4))


def test_scores_of_16_bits_are_not_rounded_in_front_of_the_softmax() -> None:
    """Full precision's attention keeps them in float32 as well; a large score that is rounded is another token."""
    generator = torch.Generator().manual_seed(0)
    q, k = (3.0 * torch.randn(1, 2, 40, 128, generator=generator).bfloat16() for _ in range(2))
    exact = (q.double() @ k.double().transpose(-1, -2) / 128**0.5).softmax(-1)
    assert float((probabilities(q, k, None).double() - exact).abs().max()) < 1e-5
