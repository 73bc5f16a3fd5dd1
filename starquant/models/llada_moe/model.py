"""LLaDA-MoE (arXiv 2509.24389) in the published checkpoints' parameter names.

A bidirectional transformer with queries and keys normalised per head; the feed-forward layer is a mixture of experts.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from starquant.models.attention import NormedAttention
from starquant.models.base import MaskedDiffusionModel, Trunk
from starquant.models.experts import OF_ATTENTION, OF_EXPERT, Mixture, Router
from starquant.models.feed_forward import FeedForward
from starquant.models.layers import RMSNorm, Rotary
from starquant.models.llada_moe.config import LLaDAMoEConfig
from starquant.models.pre_norm import PreNormBlock
from starquant.models.roles import BlockSites


class SoftmaxRouter(Router):
    """The largest probabilities over all experts, which are the weights as they are: they do not add up to 1."""

    def choose(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weights [B, L, K] in float32, chosen experts [B, L, K])."""
        probability_BLE = self(x_BLD).float().softmax(-1)
        weight_BLK, chosen_BLK = probability_BLE.topk(self.top_k, -1)
        return weight_BLK, chosen_BLK


class LLaDAMoEBlock(PreNormBlock):
    """Pre-norm attention, and experts or SwiGLU."""

    def __init__(self, config: LLaDAMoEConfig, experts: bool) -> None:
        d, eps = config.hidden_size, config.rms_norm_eps
        heads = (config.num_attention_heads, config.num_key_value_heads)
        attention = NormedAttention(d, heads, d // heads[0], eps)
        mlp: Mixture | FeedForward
        if experts:
            router = SoftmaxRouter(d, config.num_experts, config.num_experts_per_tok)
            mlp = Mixture(router, d, config.expert_intermediate_size)
        else:
            mlp = FeedForward(d, config.dense_intermediate_size)
        super().__init__(attention, mlp, d, eps)


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
        return block.sites()
