"""How an embedded model of each family is made: architecture, loss, start, length of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.models.base import MaskedDiffusionModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from starquant.models.sdar import SDARConfig, SDARForCausalLM
from starquant.testbed.tiny.objectives import Batch, balanced_masked_loss, block_loss, masked_loss
from starquant.testbed.tiny.tokenizer import EOS, MASK, vocabulary

Loss = Callable[[Any, Batch, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How an embedded model of a family is made.

    Attributes:
        new: makes a model of so many blocks, of random weights.
        loss: sum over a batch's samples.
        stages: (steps, share of the dense model's learning rate) in turn, each from its warm-up down to zero.
        block_length: tokens of a block; 1 where there are none.
        fewer: by how much a step has fewer samples than one of the dense model.
        start: shipped dense model whose weights it starts from; None for random ones.
    """

    new: Callable[[int], MaskedDiffusionModel]
    loss: Loss
    stages: tuple[tuple[int, float], ...]
    block_length: int = 1
    fewer: int = 1
    start: int | None = None

    @property
    def steps(self) -> int:
        """Of training."""
        return sum(steps for steps, _ in self.stages)


def _special_tokens() -> dict[str, Any]:
    words = vocabulary()
    return {"mask_token_id": words[MASK], "eos_token_id": words[EOS], "pad_token_id": words[EOS]}


def tiny_config(layers: int = 4) -> LLaDAConfig:
    """The embedded model's configuration: LLaDA's architecture at 0.7 M parameters (4 layers)."""
    words = vocabulary()
    return LLaDAConfig(
        d_model=128,
        n_heads=2,
        n_kv_heads=2,
        n_layers=layers,
        mlp_hidden_size=256,
        vocab_size=len(words),
        embedding_size=-(-len(words) // 64) * 64,
        max_sequence_length=256,
        init_std=0.02,
        **_special_tokens(),
    )


def tiny_sdar_config(layers: int = 4) -> SDARConfig:
    """SDAR's architecture at 0.9 M parameters: two query heads a key head, blocks of four tokens."""
    return SDARConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        block_size=4,
        max_position_embeddings=256,
        rope_theta=500000.0,
        **_special_tokens(),
    )


def tiny_llada_moe_config(layers: int = 4) -> LLaDAMoEConfig:
    """LLaDA-MoE's architecture at 0.9 M parameters: eight experts, four a token."""
    return LLaDAMoEConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_experts=8,
        num_experts_per_tok=4,
        expert_intermediate_size=48,
        dense_intermediate_size=256,
        max_position_embeddings=256,
        rope_theta=500000.0,
        **_special_tokens(),
    )


RECIPES = {
    "llada": Recipe(lambda layers: LLaDAModelLM(tiny_config(layers)), masked_loss, ((16_000, 1.0),)),
    "sdar": Recipe(
        lambda layers: SDARForCausalLM(tiny_sdar_config(layers)),
        block_loss,
        ((3_000, 0.5), (1_000, 0.3)),
        block_length=4,
        fewer=2,
        start=2,
    ),
    "llada_moe": Recipe(
        lambda layers: LLaDAMoEModelLM(tiny_llada_moe_config(layers)),
        balanced_masked_loss,
        ((2_000, 0.2),),
        fewer=2,
        start=2,
    ),
}
