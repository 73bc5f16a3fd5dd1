"""The models against a slow float64 implementation written from the formulas, one head and position at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.layers import RMSNorm
from starquant.models.llada import LLaDAConfig, LLaDAModelLM

Array = np.ndarray
IDS = [3, 17, 0, 9, 9, 20, 1]
SIZES = {"d_model": 24, "n_heads": 4, "n_layers": 2, "vocab_size": 21, "mask_token_id": 20}
LLADA = {
    "MHA": {"mlp_hidden_size": 20},
    "MHA, explicit": {"mlp_hidden_size": 20, "n_kv_heads": 4},
    "GQA": {"mlp_hidden_size": 20, "n_kv_heads": 2},
    "MQA": {"mlp_hidden_size": 20, "n_kv_heads": None, "multi_query_attention": True},
    "padded vocabulary": {"mlp_hidden_size": 20, "embedding_size": 32},
    "mlp_ratio": {"mlp_ratio": 2},
    "tied": {"mlp_hidden_size": 20, "weight_tying": True},
    "tied, padded vocabulary": {"mlp_hidden_size": 20, "weight_tying": True, "embedding_size": 32},
    "rope_theta": {"mlp_hidden_size": 20, "rope_theta": 50.0},
    "rms_norm_eps": {"mlp_hidden_size": 20, "rms_norm_eps": 0.1},
}


@dataclass
class Geometry:
    heads: int
    kv_heads: int
    theta: float
    eps: float


@dataclass
class Layer:
    """One block's weights under neutral names."""

    attention_norm: Array
    q: Array
    k: Array
    v: Array
    q_bias: Array
    k_bias: Array
    v_bias: Array
    out: Array
    mlp_norm: Array
    gate: Array
    up: Array
    down: Array


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    return gain * x / math.sqrt(sum(value * value for value in x) / len(x) + eps)


def turn(vector: Array, position: int, theta: float) -> Array:
    """Rotate each pair (i, i + half) by position * theta^(-2i/width)."""
    half = len(vector) // 2
    out = np.empty_like(vector)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        out[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
        out[i + half] = vector[i] * math.sin(angle) + vector[i + half] * math.cos(angle)
    return out


def attend(x: list[Array], layer: Layer, g: Geometry) -> list[Array]:
    width = len(layer.q) // g.heads
    out = [np.empty(len(layer.q)) for _ in x]
    for head in range(g.heads):
        shared = head * g.kv_heads // g.heads  # consecutive query heads share one key/value head
        rows, kv_rows = slice(head * width, (head + 1) * width), slice(shared * width, (shared + 1) * width)
        queries = [turn(layer.q[rows] @ h + layer.q_bias[rows], t, g.theta) for t, h in enumerate(x)]
        keys = [turn(layer.k[kv_rows] @ h + layer.k_bias[kv_rows], t, g.theta) for t, h in enumerate(x)]
        values = [layer.v[kv_rows] @ h + layer.v_bias[kv_rows] for h in x]
        for t, query in enumerate(queries):
            weights = [math.exp(float(query @ key) / math.sqrt(width)) for key in keys]
            total = sum(weights)
            out[t][rows] = sum(weight / total * value for weight, value in zip(weights, values, strict=True))
    return [layer.out @ z for z in out]


def feed_forward(h: Array, layer: Layer) -> Array:
    gate = layer.gate @ h
    return layer.down @ (gate / (1 + np.exp(-gate)) * (layer.up @ h))


def slow_logits(ids: list[int], embedding: Array, layers: list[Layer], gain: Array, head: Array, g: Geometry) -> Array:
    x = [embedding[token] for token in ids]
    for layer in layers:
        z = attend([rms_norm(h, layer.attention_norm, g.eps) for h in x], layer, g)
        x = [h + dz for h, dz in zip(x, z, strict=True)]
        x = [h + feed_forward(rms_norm(h, layer.mlp_norm, g.eps), layer) for h in x]
    return np.stack([head @ rms_norm(h, gain, g.eps) for h in x])


def randomise(model: nn.Module) -> dict[str, Array]:
    """Give every parameter a value that matters; return them in float64."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, RMSNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def llada_layer(w: dict[str, Array], index: int) -> Layer:
    def get(name: str) -> Array:
        return w[f"model.transformer.blocks.{index}.{name}.weight"]

    q, k, v = get("q_proj"), get("k_proj"), get("v_proj")
    biases = np.zeros(len(q)), np.zeros(len(k)), np.zeros(len(v))
    mlp = get("ff_norm"), get("ff_proj"), get("up_proj"), get("ff_out")
    return Layer(get("attn_norm"), q, k, v, *biases, get("attn_out"), *mlp)


def dream_layer(w: dict[str, Array], index: int) -> Layer:
    def get(name: str) -> Array:
        return w[f"model.layers.{index}.{name}"]

    names = "q_proj.weight k_proj.weight v_proj.weight q_proj.bias k_proj.bias v_proj.bias o_proj.weight".split()
    attention = [get(f"self_attn.{name}") for name in names]
    mlp = [get(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")]
    return Layer(get("input_layernorm.weight"), *attention, get("post_attention_layernorm.weight"), *mlp)


def expect_same(model: nn.Module, expected: Array) -> None:
    with torch.no_grad():
        got = model.eval()(torch.tensor([IDS])).logits[0].numpy()
    assert got.shape == expected.shape
    assert expected.std() > 0.5, "logits this small would hide a difference"
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", LLADA)
def test_llada(case: str) -> None:
    overrides = LLADA[case]
    model = LLaDAModelLM(LLaDAConfig(**SIZES, **overrides))
    w = randomise(model)
    kv_heads = {"GQA": 2, "MQA": 1}.get(case, 4)
    theta, eps = overrides.get("rope_theta", 500000.0), overrides.get("rms_norm_eps", 1e-5)
    tied = case.startswith("tied")
    assert ("model.transformer.ff_out.weight" in w) is not tied
    wte = w["model.transformer.wte.weight"]
    head = wte if tied else w["model.transformer.ff_out.weight"]
    assert len(wte) == len(head) == (32 if "padded" in case else 21)
    assert len(w["model.transformer.blocks.0.ff_proj.weight"]) == (48 if case == "mlp_ratio" else 20)
    layers = [llada_layer(w, index) for index in range(2)]
    geometry = Geometry(4, kv_heads, theta, eps)
    expect_same(model, slow_logits(IDS, wte, layers, w["model.transformer.ln_f.weight"], head, geometry))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kv_heads", "theta"), [(2, 1e6), (4, 1e6), (2, 50.0)])
def test_dream(tied: bool, kv_heads: int, theta: float) -> None:
    config = DreamConfig(
        vocab_size=21,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
        mask_token_id=20,
        tie_word_embeddings=tied,
    )
    model = DreamModel(config)
    w = randomise(model)
    embedding = w["model.embed_tokens.weight"]
    assert ("lm_head.weight" in w) is not tied
    head = embedding if tied else w["lm_head.weight"]
    layers = [dream_layer(w, index) for index in range(2)]
    expect_same(
        model, slow_logits(IDS, embedding, layers, w["model.norm.weight"], head, Geometry(4, kv_heads, theta, 1e-6))
    )
