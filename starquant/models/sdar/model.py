"""SDAR (github.com/JetAstra/SDAR) in the published checkpoints' parameter names.

A Qwen3 transformer with block-causal attention: grouped queries, queries and keys normalised per head, no biases.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from starquant.models.attention import NormedAttention
from starquant.models.base import Trunk
from starquant.models.block_causal import BlockCausalModel
from starquant.models.feed_forward import FeedForward
from starquant.models.layers import RMSNorm, Rotary
from starquant.models.pre_norm import PreNormBlock
from starquant.models.roles import BlockSites
from starquant.models.sdar.config import SDARConfig


class SDARBlock(PreNormBlock):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: SDARConfig) -> None:
        d, eps = config.hidden_size, config.rms_norm_eps
        heads = (config.num_attention_heads, config.num_key_value_heads)
        attention = NormedAttention(d, heads, config.head_dim, eps)
        super().__init__(attention, FeedForward(d, config.intermediate_size), d, eps)


class SDARBaseModel(nn.Module):
    """The `model.*` level of the published parameter names."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SDARBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta)


class SDARForCausalLM(BlockCausalModel):
    """SDAR with its head; the name is the published one, so that saved configs stay interchangeable."""

    config_class = SDARConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["SDARBlock"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.model = SDARBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def trunk(self) -> Trunk:
        """Return the model's parts."""
        m = self.model
        return Trunk(m.embed_tokens, m.layers, m.norm, self.lm_head, m.rotary)

    def block_sites(self, block: SDARBlock) -> BlockSites:
        """SDAR's linears by role."""
        return block.sites(self.states)
