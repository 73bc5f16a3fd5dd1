"""What llama.cpp calls the parts of LLaDA and Dream: architecture, keys, tensors, the order of rows.

Its `llada` rotates neighbouring channels of a head where the checkpoint rotates its halves, so that rows of q and k are
interleaved; its `dream` rotates halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import LinearKey, Role, Site

TENSORS = {
    Role.Q: "attn_q",
    Role.K: "attn_k",
    Role.V: "attn_v",
    Role.OUT: "attn_output",
    Role.GATE: "ffn_gate",
    Role.UP: "ffn_up",
    Role.DOWN: "ffn_down",
}
NORMS = {Site.QKV: "attn_norm", Site.GATE_UP: "ffn_norm"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows a family.

    Attributes:
        name: of the architecture.
        interleaves: whether rows of q and k are interleaved within a head.
        feed_forward: attribute of the configuration with the feed-forward width.
    """

    name: str
    interleaves: bool
    feed_forward: str


#: By the `model_type` of config.json.
ARCHITECTURES = {
    "llada": Architecture("llada", True, "feed_forward_size"),
    "Dream": Architecture("dream", False, "intermediate_size"),
}


def architecture_of(model_type: str) -> Architecture:
    """Return what llama.cpp calls a `model_type`; raises ConfigError for one that it does not have, or not so."""
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise ConfigError(
            f"export.format: got gguf for a model of type '{model_type}', allowed: {', '.join(ARCHITECTURES)}"
        )
    return architecture


def validate_architecture(model: MaskedDiffusionModel) -> None:
    """Refuse a model that llama.cpp has no such architecture of; raises ConfigError. May be on the meta device."""
    architecture_of(str(model.config.model_type))
    for block in model.trunk().blocks:
        for role in model.block_sites(block).linears:
            linear_tensor(0, role)


def hyperparameters(model: MaskedDiffusionModel) -> dict[str, Any]:
    """Return the keys of the architecture, without its name in front: whole numbers, floats, booleans."""
    config, trunk = model.config, model.trunk()
    attention = model.block_sites(trunk.blocks[0]).attention
    norm: Any = trunk.norm
    return {
        "block_count": len(trunk.blocks),
        "context_length": int(config.context_length),
        "embedding_length": int(trunk.embedding.embedding_dim),
        "feed_forward_length": int(getattr(config, architecture_of(str(config.model_type)).feed_forward)),
        "attention.head_count": attention.n_heads,
        "attention.head_count_kv": attention.n_kv_heads,
        "attention.layer_norm_rms_epsilon": float(norm.eps),
        "attention.causal": False,
        "rope.dimension_count": attention.head_dim,
        "rope.freq_base": float(trunk.rotary.theta),
        "vocab_size": int(trunk.embedding.num_embeddings),
    }


def linear_tensor(block: int, role: LinearKey) -> str:
    """Return the name of a linear's tensor, without ".weight"."""
    if not isinstance(role, Role):
        raise ConfigError("export.format: got gguf for a mixture of experts, allowed: dense models")
    return f"blk.{block}.{TENSORS[role]}"


def row_order(model: MaskedDiffusionModel, role: LinearKey, rows: int) -> Tensor | None:
    """Return which row of a linear's weight stands where in the file, [O]; None for as they are."""
    if role not in (Role.Q, Role.K) or not architecture_of(str(model.config.model_type)).interleaves:
        return None
    width = model.block_sites(model.trunk().blocks[0]).attention.head_dim
    return torch.arange(rows).view(-1, 2, width // 2).mT.flatten()
