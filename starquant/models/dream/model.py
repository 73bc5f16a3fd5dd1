"""Dream (arXiv 2508.15487) in the published checkpoints' parameter names.

A Qwen2.5 transformer without a causal mask: grouped-query attention with q/k/v biases. The hidden state at
position i - 1 predicts position i (`logit_offset`), a habit kept from the autoregressive initialisation.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from starquant.models.attention import ProjectedAttention
from starquant.models.base import MaskedDiffusionModel, Trunk
from starquant.models.dream.config import DreamConfig
from starquant.models.feed_forward import FeedForward
from starquant.models.layers import RMSNorm, Rotary
from starquant.models.pre_norm import PreNormBlock
from starquant.models.roles import BlockSites


class DreamBlock(PreNormBlock):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: DreamConfig) -> None:
        d, heads = config.hidden_size, (config.num_attention_heads, config.num_key_value_heads)
        attention = ProjectedAttention(d, heads, d // heads[0], bias=True)
        super().__init__(attention, FeedForward(d, config.intermediate_size), d, config.rms_norm_eps)


class DreamBaseModel(nn.Module):
    """The `model.*` level of the published parameter names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.hidden_size // config.num_attention_heads, config.rope_theta)


class DreamModel(MaskedDiffusionModel):
    """Dream with its head; the name is the published one, so that saved configs stay interchangeable."""

    config_class = DreamConfig
    base_model_prefix = "model"
    logit_offset = -1
    _no_split_modules: ClassVar[list[str]] = ["DreamBlock"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def trunk(self) -> Trunk:
        """Return the model's parts."""
        m = self.model
        return Trunk(m.embed_tokens, m.layers, m.norm, self.lm_head, m.rotary)

    def block_sites(self, block: DreamBlock) -> BlockSites:
        """Dream's linears by role."""
        return block.sites(self.states)
