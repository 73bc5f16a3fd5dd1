"""Exact rewritings keep the function; attention keeps its transforms and static scales."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from starquant.config.bits import ActivationSpec, AttentionSpec, BitsSpec, WeightSpec
from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import AttentionCore, RMSNorm
from starquant.models.roles import Role, Site
from starquant.numerics import Rotation, hadamard_matrix, random_rotation
from starquant.quantized import (
    HadamardTransform,
    QuantizedAttentionCore,
    rewriting,
    set_static_value_scales,
    transform_queries_and_keys,
)
from starquant.quantized.install import install, quantize_block, round_to_nearest
from tests.support.models import llada_gqa

WIDTHS = (12, 20, 28, 148, 64)  # the Hadamard matrices of the first two are not symmetric
HEADS = [(6, 6), (6, 2), (4, 1)]


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A random linear in float64, where rewritings are exact to rounding."""
    made = nn.Linear(inputs, outputs, bias=bias).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return made


def rows(width: int) -> Tensor:
    return torch.randn(2, 5, width, dtype=torch.float64)


def rotations(width: int) -> list[Rotation]:
    return [random_rotation(kind, width, seed=3) for kind in ("hadamard", "orthogonal")]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def changed(before: nn.Linear, after: nn.Linear) -> bool:
    return not torch.allclose(before.weight, after.weight, rtol=1e-2)


@pytest.mark.parametrize("width", WIDTHS)
def test_transposes_matter_at_these_sizes(width: int) -> None:
    matrix = hadamard_matrix(width)
    assert torch.equal(matrix, matrix.T) == (width not in WIDTHS[:2])


def test_fold_gain_keeps_what_all_readers_compute() -> None:
    norm = RMSNorm(24, 1e-5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24))  # gains may be negative
    readers = [linear(24, 7), linear(24, 9, bias=False)]
    x = rows(24).float().double()  # the norm itself computes in float32
    wanted = [reader(norm(x)) for reader in readers]
    kept = copy.deepcopy(readers)
    rewriting.fold_gain(norm, readers)
    assert torch.equal(norm.weight, torch.ones(24))
    for reader, old, want in zip(readers, kept, wanted, strict=True):
        close(reader(norm(x)), want)
        assert changed(old, reader)


def test_a_norm_that_takes_no_rewriting_is_refused() -> None:
    """A LayerNorm subtracts the mean, which no rotation keeps, and adds a bias."""
    with pytest.raises(ConfigError, match="LayerNorm cannot take a rewriting"):
        rewriting.fold_gain(nn.LayerNorm(24), [linear(24, 7)])
    with pytest.raises(ConfigError, match="LayerNorm cannot take a rewriting"):
        rewriting.divide_gain(nn.LayerNorm(24), torch.ones(24))


def test_scales_move_from_a_norm_to_its_readers() -> None:
    norm, readers, scale = RMSNorm(24, 1e-5).double(), [linear(24, 7), linear(24, 9)], torch.rand(24) + 0.1
    x = rows(24).float().double()
    wanted, normed = [reader(norm(x)) for reader in readers], norm(x)
    rewriting.scale_input(readers, scale)
    rewriting.divide_gain(norm, scale)
    close(norm(x), normed / scale)
    for reader, want in zip(readers, wanted, strict=True):
        close(reader(norm(x)), want)


@pytest.mark.parametrize("bias", [True, False])
def test_scales_move_from_a_linear_to_its_readers(bias: bool) -> None:
    first, second, scale, x = linear(10, 24, bias), linear(24, 7), torch.rand(24) + 0.1, rows(10)
    want, middle = second(first(x)), first(x)
    rewriting.divide_output(first, scale)
    rewriting.scale_input([second], scale)
    close(first(x), middle / scale)
    close(second(first(x)), want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_rotations_move_through_the_stream_between_two_linears(width: int, bias: bool) -> None:
    for rotation in rotations(width):
        matrix = rotation.apply(torch.eye(width, dtype=torch.float64))
        close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
        writer, readers, x = linear(10, width, bias), [linear(width, 7), linear(width, 9)], rows(10)
        stream, wanted = writer(x), [reader(writer(x)) for reader in readers]
        rewriting.rotate_output(writer, rotation)
        rewriting.rotate_input(readers, rotation)
        close(writer(x), stream @ matrix)
        for reader, want in zip(readers, wanted, strict=True):
            close(reader(writer(x)), want)
        close(rotation.inverse(writer(x)), stream)


@pytest.mark.parametrize("width", WIDTHS)
def test_hadamard_input_undoes_the_online_transform(width: int) -> None:
    reader, x = linear(width, 9), rows(width)
    want, kept = reader(x), copy.deepcopy(reader)
    rewriting.hadamard_input(reader)
    close(reader(HadamardTransform(width)(x)), want)
    close(reader.weight, kept.weight @ hadamard_matrix(width))


@pytest.mark.parametrize("head_dim", [8, 12, 20, 28])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_rotated_value_heads_are_undone_behind_the_attention(heads: int, kv_heads: int, head_dim: int) -> None:
    """z_h = P_h V_(h // group) with any probabilities P, then the output projection."""
    values, out, x = linear(10, kv_heads * head_dim), linear(heads * head_dim, 11), rows(10)
    p_BHLL = torch.rand(2, heads, 5, 5, dtype=torch.float64)

    def attend() -> Tensor:
        v_BLKE = values(x).reshape(2, 5, kv_heads, head_dim)
        z = [p_BHLL[:, h] @ v_BLKE[:, :, h // (heads // kv_heads)] for h in range(heads)]
        return out(torch.cat(z, -1))

    plain, want, kept = values(x), attend(), copy.deepcopy(values)
    rewriting.hadamard_heads_output(values, kv_heads)
    rewriting.hadamard_heads_input(out, heads)
    matrix = torch.block_diag(*[hadamard_matrix(head_dim)] * kv_heads)
    close(values(x), plain @ matrix)
    close(attend(), want)
    assert changed(kept, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_in_float64_whatever_the_dtype(dtype: torch.dtype) -> None:
    """The result is the exact one, rounded once."""
    scale = torch.rand(28) + 0.5
    matrix = hadamard_matrix(28)
    cases = {
        "scale": (lambda m: rewriting.scale_input([m], scale), lambda w: w * scale.double()),
        "divide": (lambda m: rewriting.divide_output(m, scale), lambda w: w / scale.double()[:, None]),
        "hadamard": (rewriting.hadamard_input, lambda w: w @ matrix),
    }
    for change, exact in cases.values():
        made = linear(28, 28).to(dtype)
        want = exact(made.weight.detach().double())
        change(made)
        assert made.weight.dtype == made.bias.dtype == dtype
        assert made.weight.requires_grad
        ulp = torch.finfo(dtype).eps * float(want.abs().max())
        assert float((made.weight.detach().double() - want).abs().max()) <= 0.6 * ulp


# Attention


def operands(heads: int, kv_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, heads, 7, width), torch.randn(2, kv_heads, 7, width), torch.randn(2, kv_heads, 7, width)


def key_mask() -> Tensor:
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[0, ..., -3:] = False
    return mask


FULL = dict.fromkeys("qkpv", 16)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("mask", [None, key_mask()], ids=["whole", "padded"])
def test_16_bits_are_the_attention_itself(heads: int, kv_heads: int, mask: Tensor | None) -> None:
    q, k, v = operands(heads, kv_heads, 12)
    exact = AttentionCore()(q, k, v, mask)
    assert torch.equal(QuantizedAttentionCore(FULL)(q, k, v, mask), exact)
    scaled = QuantizedAttentionCore(FULL, v_scale_KE=torch.rand(kv_heads, 12))
    assert torch.equal(scaled(q, k, v, mask), exact)  # static scales wait until V is quantized


@pytest.mark.parametrize("width", [12, 28, 16])
@pytest.mark.parametrize("mask", [None, key_mask()], ids=["whole", "padded"])
def test_transformed_queries_and_keys_leave_the_probabilities(width: int, mask: Tensor | None) -> None:
    q, k, v = (x.double() for x in operands(6, 2, width))
    core = QuantizedAttentionCore(FULL, HadamardTransform(width))
    close(core(q, k, v, mask), AttentionCore()(q, k, v, mask))


@pytest.mark.parametrize("mask", [None, key_mask()], ids=["whole", "padded"])
def test_static_scales_and_transform_against_loops(mask: Tensor | None) -> None:
    width, bits = 12, {"q": 4, "k": 3, "p": 5, "v": 3}
    q, k, v = operands(6, 2, width)
    scale_KE, matrix = torch.rand(2, width) * 0.5 + 0.1, hadamard_matrix(width, torch.float32)
    out = QuantizedAttentionCore(bits, HadamardTransform(width), scale_KE)(q, k, v, mask)

    def per_row(x: Tensor, top: int) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / top
        return torch.round(x / step) * step

    clipped = 0
    for b in range(2):
        for h in range(6):
            q4, k3 = per_row(q[b, h] @ matrix, 7), per_row(k[b, h // 3] @ matrix, 3)
            scores = q4 @ k3.T / math.sqrt(width)
            if mask is not None:
                scores = scores.masked_fill(~mask[b, 0], -torch.inf)
            p5 = per_row(scores.softmax(-1), 31)
            v3 = torch.empty(7, width)
            for j in range(7):
                for e in range(width):
                    s = float(scale_KE[h // 3, e])
                    code = round(float(v[b, h // 3, j, e]) / s)
                    clipped += code > 3 or code < -4
                    v3[j, e] = s * min(max(code, -4), 3)
            torch.testing.assert_close(out[b, h], p5 @ v3, rtol=1e-4, atol=1e-5)
    assert clipped > 0


def bits(attention: AttentionSpec, width: int = 16) -> BitsSpec:
    return BitsSpec(
        name="test", weights=WeightSpec(bits=width), activations=ActivationSpec(bits=width), attention=attention
    )


def place(model: MaskedDiffusionModel, order: str) -> dict[int, tuple[nn.Module, Tensor]]:
    """Give every attention a transform and static scales, in either order; returns them by block."""
    placed = {}
    for index, block in enumerate(model.trunk().blocks):
        attention = model.block_sites(block).attention
        transform = HadamardTransform(attention.head_dim)
        scale_KE = torch.rand(attention.n_kv_heads, attention.head_dim) + 0.5
        steps = [
            lambda a=attention, t=transform: transform_queries_and_keys(a, t),
            lambda a=attention, s=scale_KE: set_static_value_scales(a, s),
        ]
        for step in steps if order == "transform first" else steps[::-1]:
            step()
        placed[index] = (transform, scale_KE)
    return placed


def logits(model: MaskedDiffusionModel) -> Tensor:
    with torch.inference_mode():
        return model(torch.randint(0, 190, (2, 16), generator=torch.Generator().manual_seed(0))).logits


@pytest.mark.parametrize("order", ["transform first", "scales first"])
@pytest.mark.parametrize("where", ["model", "copies"])
def test_installing_keeps_transforms_and_static_scales(golden_model, order: str, where: str) -> None:
    placed = place(golden_model, order)
    plan = bits(AttentionSpec(q=4, k=4, v=3), width=4)
    if where == "model":
        manifest = install(golden_model, plan)
        told = {e.role: e.transform for e in manifest if e.kind == "operand" and e.block == 0}
        width = golden_model.block_sites(golden_model.trunk().blocks[0]).attention.head_dim
        assert told == {"q": f"hadamard {width}", "k": f"hadamard {width}", "p": None, "v": None}
    for index, block in enumerate(golden_model.trunk().blocks):
        if where == "copies":
            block = copy.deepcopy(block)
            quantize_block(golden_model, block, index, plan, round_to_nearest)
        core = golden_model.block_sites(block).attention.core
        assert {name: fmt.bits for name, fmt in core.formats.items()} == {"q": 4, "k": 4, "p": 16, "v": 3}
        assert torch.equal(core.v_scale_KE, placed[index][1])
        assert str(core.qk_transform) == str(placed[index][0])


@pytest.mark.parametrize("order", ["transform first", "scales first"])
def test_without_bits_what_was_placed_changes_nothing(golden_model, order: str) -> None:
    exact = logits(golden_model)
    place(golden_model, order)
    manifest = install(golden_model, bits(AttentionSpec()))
    torch.testing.assert_close(logits(golden_model), exact, rtol=1e-3, atol=1e-4)
    assert all(e.reason for e in manifest)


def test_site_transforms_stay_in_front_of_the_quantizer() -> None:
    model = llada_gqa()
    exact = logits(model)
    for block in model.trunk().blocks:
        sites = model.block_sites(block)
        rewriting.hadamard_input(sites.linears[Role.DOWN])
        sites.inputs[Site.DOWN].transform = HadamardTransform(sites.linears[Role.DOWN].in_features)
    torch.testing.assert_close(logits(model), exact, rtol=1e-3, atol=1e-4)
    manifest = install(model, bits(AttentionSpec(), width=8))
    told = {e.role: e.transform for e in manifest if e.kind == "linear" and e.block == 1}
    assert told == {role.value: "hadamard 160" if role is Role.DOWN else None for role in Role}
    relative = float((logits(model) - exact).norm() / exact.norm())
    assert 0.0 < relative < 0.1


@pytest.mark.parametrize("order", ["transform first", "scales first"])
def test_static_scales_take_effect_once_values_are_quantized(order: str) -> None:
    first, second = llada_gqa(), llada_gqa()
    place(first, order)
    install(first, bits(AttentionSpec(v=4)))
    install(second, bits(AttentionSpec(v=4)))
    assert not torch.allclose(logits(first), logits(second), rtol=1e-3)


def test_a_whole_block_rotated_and_scaled_computes_the_same() -> None:
    """All rewritings at once, on LLaDA with shared value heads."""
    model = llada_gqa().double()
    exact = logits(model)
    rotation = random_rotation("hadamard", 96, seed=5)
    trunk = model.trunk()
    with torch.no_grad():
        trunk.embedding.weight.copy_(rotation.apply(trunk.embedding.weight))
    for block in trunk.blocks:
        sites = model.block_sites(block)
        for site, norm in sites.norms.items():
            readers = list(sites.readers(site).values())
            rewriting.fold_gain(norm, readers)
            rewriting.rotate_input(readers, rotation)
            rewriting.scale_input(readers, scale := torch.rand(96) + 0.5)
            rewriting.divide_gain(norm, scale)
        for role in (Role.OUT, Role.DOWN):
            rewriting.rotate_output(sites.linears[role], rotation)
        rewriting.hadamard_heads_output(sites.linears[Role.V], sites.attention.n_kv_heads)
        rewriting.hadamard_heads_input(sites.linears[Role.OUT], sites.attention.n_heads)
        rewriting.divide_output(sites.linears[Role.UP], scale := torch.rand(160) + 0.5)
        rewriting.scale_input([sites.linears[Role.DOWN]], scale)
    rewriting.fold_gain(trunk.norm, [trunk.head])
    rewriting.rotate_input([trunk.head], rotation)
    torch.testing.assert_close(logits(model), exact, rtol=1e-4, atol=1e-4)  # norms and rotary compute in float32
