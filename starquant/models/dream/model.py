"""Dream (arXiv 2508.15487) in the published checkpoints' parameter names.

A Qwen2.5 transformer without a causal mask: grouped-query attention with q/k/v biases. The hidden state at
position i - 1 predicts position i (`logit_offset`), a habit kept from the autoregressive initialisation.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from starquant.models.base import MaskedDiffusionModel, Trunk
from starquant.models.context import Context
from starquant.models.dream.config import DreamConfig
from starquant.models.layers import InputSite, RMSNorm, Rotary, RotaryAttention, added
from starquant.models.roles import BlockSites, Role, Site


class DreamAttention(nn.Module):
    """The projections around the attention, under the published `self_attn` names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        d = config.hidden_size
        head_dim = d // config.num_attention_heads
        kv = config.num_key_value_heads * head_dim
        self.q_proj = nn.Linear(d, d, bias=True)
        self.k_proj = nn.Linear(d, kv, bias=True)
        self.v_proj = nn.Linear(d, kv, bias=True)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.attention = RotaryAttention(config.num_attention_heads, config.num_key_value_heads, head_dim)
        self.qkv_input, self.out_input = InputSite(), InputSite()

    def forward(self, x_BLD: Tensor, context: Context, norm: RMSNorm) -> Tensor:
        """Add to the residual stream what its norm attends to, over all positions."""
        h = self.qkv_input(x_BLD, context, norm)
        z = self.attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), context)
        return added(x_BLD, self.o_proj, self.out_input(z, context))


class DreamMLP(nn.Module):
    """SwiGLU under the published `mlp` names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.gate_up_input, self.down_input = InputSite(), InputSite()

    def forward(self, x_BLD: Tensor, context: Context, norm: RMSNorm) -> Tensor:
        """Add the gated feed-forward of the normalised stream to the stream."""
        h = self.gate_up_input(x_BLD, context, norm)
        return added(x_BLD, self.down_proj, self.down_input(self.up_proj(h), context, self.gate_proj(h)))


class DreamBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn = DreamAttention(config)
        self.mlp = DreamMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Add attention and feed-forward to the residual stream."""
        x_BLD = self.self_attn(x_BLD, context, self.input_layernorm)
        y_BLD: Tensor = self.mlp(x_BLD, context, self.post_attention_layernorm)
        return y_BLD


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
        """Dream's names for the roles of one block's linears."""
        attn, mlp = block.self_attn, block.mlp
        return BlockSites(
            linears={
                Role.Q: attn.q_proj,
                Role.K: attn.k_proj,
                Role.V: attn.v_proj,
                Role.OUT: attn.o_proj,
                Role.GATE: mlp.gate_proj,
                Role.UP: mlp.up_proj,
                Role.DOWN: mlp.down_proj,
            },
            inputs={
                Site.QKV: attn.qkv_input,
                Site.OUT: attn.out_input,
                Site.GATE_UP: mlp.gate_up_input,
                Site.DOWN: mlp.down_input,
            },
            attention=attn.attention,
            norms={Site.QKV: block.input_layernorm, Site.GATE_UP: block.post_attention_layernorm},
        )
