"""LLaDA-MoE (arXiv 2509.24389) in the published checkpoints' parameter names.

A bidirectional transformer with queries and keys normalised per head; the feed-forward layer is a mixture of experts.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from starquant.models.attention import NormedAttention
from starquant.models.base import MaskedDiffusionModel, Trunk
from starquant.models.context import Context
from starquant.models.experts import OF_ATTENTION, OF_EXPERT, Mixture, Router, experts_of, routers_of
from starquant.models.feed_forward import FeedForward
from starquant.models.layers import RMSNorm, Rotary
from starquant.models.llada_moe.config import LLaDAMoEConfig
from starquant.models.roles import BlockSites, Site


class SoftmaxRouter(Router):
    """The largest probabilities over all experts, which are the weights as they are: they do not add up to 1."""

    def choose(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weights [B, L, K] in float32, chosen experts [B, L, K])."""
        probability_BLE = self(x_BLD).float().softmax(-1)
        weight_BLK, chosen_BLK = probability_BLE.topk(self.top_k, -1)
        return weight_BLK, chosen_BLK


class LLaDAMoEBlock(nn.Module):
    """Pre-norm attention, and experts or SwiGLU."""

    def __init__(self, config: LLaDAMoEConfig, experts: bool) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        heads = (config.num_attention_heads, config.num_key_value_heads)
        self.self_attn = NormedAttention(d, heads, d // heads[0], eps)
        self.mlp: Mixture | FeedForward
        if experts:
            router = SoftmaxRouter(d, config.num_experts, config.num_experts_per_tok)
            self.mlp = Mixture(router, d, config.expert_intermediate_size)
        else:
            self.mlp = FeedForward(d, config.dense_intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Add attention and feed-forward to the residual stream."""
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), context)
        y_BLD: Tensor = self.mlp(self.post_attention_layernorm(x_BLD), context)
        return x_BLD + y_BLD


class LLaDAMoEBaseModel(nn.Module):
    """The `model.*` level of the published parameter names."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = config.moe_layer_freq[: config.num_hidden_layers]
        self.layers = nn.ModuleList(LLaDAMoEBlock(config, bool(flag)) for flag in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.hidden_size // config.num_attention_heads, config.rope_theta)


class LLaDAMoEModelLM(MaskedDiffusionModel):
    """LLaDA-MoE with its head; the name is the published one, by which config.json tells it from dense LLaDA."""

    config_class = LLaDAMoEConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["LLaDAMoEBlock"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.model = LLaDAMoEBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def trunk(self) -> Trunk:
        """Return the model's parts."""
        m = self.model
        return Trunk(m.embed_tokens, m.layers, m.norm, self.lm_head, m.rotary)

    def linear_count(self) -> int:
        """Return how many linears the architecture has in its blocks."""
        config = self.config
        layers = config.moe_layer_freq[: config.num_hidden_layers]
        experts = [config.num_experts if flag else 1 for flag in layers]
        return sum(OF_ATTENTION + OF_EXPERT * number for number in experts)

    def block_sites(self, block: LLaDAMoEBlock) -> BlockSites:
        """LLaDA-MoE's linears by role and expert."""
        attn, mlp = block.self_attn, block.mlp
        return BlockSites(
            linears={**attn.linears(), **mlp.linears()},
            inputs={**attn.inputs(), **mlp.inputs()},
            attention=attn.attention,
            norms={Site.QKV: block.input_layernorm, Site.GATE_UP: block.post_attention_layernorm},
            routers=routers_of(mlp),
            experts=experts_of(mlp),
        )
