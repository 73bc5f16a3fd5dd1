"""SDAR (github.com/JetAstra/SDAR) in the published checkpoints' parameter names.

A Qwen3 transformer with block-causal attention: grouped queries, queries and keys normalised per head, no biases.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from starquant.models.attention import NormedAttention
from starquant.models.base import Trunk
from starquant.models.block_causal import BlockCausalModel
from starquant.models.context import Context
from starquant.models.feed_forward import FeedForward
from starquant.models.layers import RMSNorm, Rotary
from starquant.models.roles import BlockSites, Site
from starquant.models.sdar.config import SDARConfig


class SDARBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        heads = (config.num_attention_heads, config.num_key_value_heads)
        self.self_attn = NormedAttention(d, heads, config.head_dim, eps)
        self.mlp = FeedForward(d, config.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Add attention and feed-forward to the residual stream."""
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), context)
        y_BLD: Tensor = self.mlp(self.post_attention_layernorm(x_BLD), context)
        return x_BLD + y_BLD


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
        attn, mlp = block.self_attn, block.mlp
        return BlockSites(
            linears={**attn.linears(), **mlp.linears()},
            inputs={**attn.inputs(), **mlp.inputs()},
            attention=attn.attention,
            norms={Site.QKV: block.input_layernorm, Site.GATE_UP: block.post_attention_layernorm},
        )
