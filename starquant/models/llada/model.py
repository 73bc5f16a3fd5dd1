"""LLaDA (arXiv 2502.09992) in the published checkpoints' parameter names.

A LLaMA-style transformer without a causal mask.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from starquant.models.base import MaskedDiffusionModel, Trunk
from starquant.models.context import Context
from starquant.models.layers import InputSite, RMSNorm, Rotary, RotaryAttention, added
from starquant.models.llada.config import LLaDAConfig
from starquant.models.roles import BlockSites, Role, Site


class LLaDABlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        d, f = config.d_model, config.feed_forward_size
        head_dim = d // config.n_heads
        kv = config.kv_heads * head_dim
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_norm = RMSNorm(d, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.ff_out = nn.Linear(f, d, bias=False)
        self.attention = RotaryAttention(config.n_heads, config.kv_heads, head_dim)
        self.qkv_input, self.out_input = InputSite(), InputSite()
        self.gate_up_input, self.down_input = InputSite(), InputSite()

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Add attention and feed-forward to the residual stream."""
        h = self.qkv_input(x_BLD, context, self.attn_norm)
        z = self.attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), context)
        x_BLD = added(x_BLD, self.attn_out, self.out_input(z, context))
        h = self.gate_up_input(x_BLD, context, self.ff_norm)
        return added(x_BLD, self.ff_out, self.down_input(self.up_proj(h), context, self.ff_proj(h)))


class LLaDAModel(nn.Module):
    """The `model.transformer.*` level of the published parameter names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.rows, config.d_model),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.rows, bias=False)
        self.transformer = nn.ModuleDict(parts)
        self.rotary = Rotary(config.d_model // config.n_heads, config.rope_theta)


class LLaDAModelLM(MaskedDiffusionModel):
    """LLaDA with its head; the name is the published one, so that saved configs stay interchangeable."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["LLaDABlock"]

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def trunk(self) -> Trunk:
        """Return the model's parts; the head is None when tied to the embedding."""
        t = self.model.transformer
        head = None if self.config.weight_tying else t["ff_out"]
        return Trunk(t["wte"], t["blocks"], t["ln_f"], head, self.model.rotary)

    def block_sites(self, block: LLaDABlock) -> BlockSites:
        """LLaDA's names for the roles of one block's linears."""
        return BlockSites(
            linears={
                Role.Q: block.q_proj,
                Role.K: block.k_proj,
                Role.V: block.v_proj,
                Role.OUT: block.attn_out,
                Role.GATE: block.ff_proj,
                Role.UP: block.up_proj,
                Role.DOWN: block.ff_out,
            },
            inputs={site: getattr(block, site.value) for site in Site},
            attention=block.attention,
            norms={Site.QKV: block.attn_norm, Site.GATE_UP: block.ff_norm},
        )
