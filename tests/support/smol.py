"""A pretrained model of two layers, a tokenizer of bytes and tasks to try the training of deltas on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from starquant.models.dream import DreamConfig, DreamModel
from starquant.testbed.items import Split, rng_for
from starquant.testbed.smol.training.network import LINEARS, NORMS

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD = 2, 64, 4, 2, 96
HEAD_DIM = WIDTH // HEADS
SPECIAL = ("<unk>", "<s>", "</s>", "<mask>")
BOS, EOS, MASK = 1, 2, 3
VOCABULARY = 256 + len(SPECIAL)
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (FEED_FORWARD, WIDTH),
    "mlp.up_proj": (FEED_FORWARD, WIDTH),
    "mlp.down_proj": (WIDTH, FEED_FORWARD),
}


def random_base(seed: int = 0) -> dict[str, Tensor]:
    """Weights under transformers' Llama names, with attention that is far from even."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = {"model.embed_tokens.weight": noise(VOCABULARY, WIDTH), "model.norm.weight": 1 + noise(WIDTH) / 10}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in SHAPES.items():
            base[f"model.layers.{layer}.{name}.weight"] = noise(outputs, inputs) / inputs**0.5
        for name in NORMS.values():
            base[f"model.layers.{layer}.{name}.weight"] = 1 + noise(WIDTH) / 10
    return base


def bytes_tokenizer() -> Tokenizer:
    """One token a byte."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    return tokenizer


class Item(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str


def stream(task: str, seed: int, count: int, split: Split) -> list[Item]:
    """Items that name their task and split."""
    rng = rng_for(task, seed, split.value)
    numbers = [rng.randrange(1000) for _ in range(count)]
    return [Item(f"{split.value} {task} {number}:", " " + "z" * (1 + number % 9)) for number in numbers]


def write_text(folder: Path, documents: int = 50) -> Path:
    """Text files of 200 to 700 bytes, each of one word that tells its number."""
    folder.mkdir()
    for number in range(documents):
        (folder / f"{number:03}.txt").write_text(f"<{number:03}> " * (33 + number * 83 // documents))
    return folder


def merged_model(base: Mapping[str, Tensor], delta: Mapping[str, Tensor], layers: int = LAYERS) -> DreamModel:
    """The checkpoint that a delta makes of the base, in float32."""
    config = DreamConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        mask_token_id=MASK,
    )
    head = base["model.embed_tokens.weight"]
    embedding = head.clone()
    embedding[MASK] = delta["mask"]
    state = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "model.norm.weight": delta["nf"],
    }
    for layer in range(layers):
        where = f"model.layers.{layer}"
        for short, name in LINEARS.items():
            weight = base[f"{where}.{name}.weight"]
            state[f"{where}.{name}.weight"] = (
                weight + delta[f"{layer}.{short}.B"].float() @ delta[f"{layer}.{short}.A"].float()
            )
            if short in "qkv":
                state[f"{where}.{name}.bias"] = torch.zeros(len(weight))
        for short, name in NORMS.items():
            state[f"{where}.{name}.weight"] = delta[f"{layer}.{short}"]
    model = DreamModel(config).eval()
    model.load_state_dict(state)
    return model
