"""LLaDA2.0 and 2.1 (github.com/inclusionAI/LLaDA2.X) in the published checkpoints' parameter names.

Block-causal attention with queries and keys normalised per head and partly turned; the first layers are dense, the
others mixtures with experts that every token passes beside the routed ones.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from starquant.models.base import Trunk
from starquant.models.block_causal import BlockCausalModel
from starquant.models.context import Context
from starquant.models.experts import OF_ATTENTION, OF_EXPERT, Mixture, experts_of, routers_of
from starquant.models.feed_forward import Expert, FeedForward
from starquant.models.layers import InputSite, RMSNorm, Rotary, RotaryAttention, added
from starquant.models.llada2.config import LLaDA2MoeConfig
from starquant.models.llada2.router import GroupedSigmoidRouter
from starquant.models.roles import BlockSites, LinearKey, Role, Site
from starquant.numerics import States
from starquant.numerics.token_states import EDITING

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class LLaDA2Attention(nn.Module):
    """The projections around the attention; q, k and v are stored as one, `query_key_value`."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        d, e, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, heads * e, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(d, kv_heads * e, bias=False) for _ in range(2))
        self.dense = nn.Linear(heads * e, d, bias=False)
        self.query_layernorm, self.key_layernorm = RMSNorm(e, eps), RMSNorm(e, eps)
        self.attention = RotaryAttention(heads, kv_heads, e)
        self.qkv_input, self.out_input = InputSite(), InputSite()

    def forward(self, x_BLD: Tensor, context: Context, norm: RMSNorm) -> Tensor:
        """Add to the residual stream what its norm attends to, where the context's mask shows it."""
        h = self.qkv_input(x_BLD, context, norm)
        norms = self.query_layernorm, self.key_layernorm
        z = self.attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), context, norms)
        return added(x_BLD, self.dense, self.out_input(z, context))


class LLaDA2Mixture(Mixture):
    """Routed experts, and one layer of the shared ones."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        hidden = config.moe_intermediate_size
        super().__init__(GroupedSigmoidRouter(config), config.hidden_size, hidden)
        shared = config.num_shared_experts
        self.shared_experts = Expert(config.hidden_size, hidden * shared) if shared else None

    def shared(self) -> Expert | None:
        """Return the layer that every token passes."""
        return self.shared_experts


class LLaDA2Block(nn.Module):
    """Pre-norm attention, and experts or SwiGLU."""

    def __init__(self, config: LLaDA2MoeConfig, index: int) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.attention = LLaDA2Attention(config)
        dense = index < config.first_k_dense_replace
        self.mlp = FeedForward(d, config.intermediate_size) if dense else LLaDA2Mixture(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Add attention and feed-forward to the residual stream."""
        x_BLD = self.attention(x_BLD, context, self.input_layernorm)
        y_BLD: Tensor = self.mlp(x_BLD, context, self.post_attention_layernorm)
        return y_BLD


class LLaDA2BaseModel(nn.Module):
    """The `model.*` level of the published parameter names."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.rotated, config.rope_theta)


class LLaDA2MoeModelLM(BlockCausalModel):
    """LLaDA2 with its head; the name is the published one, so that saved configs stay interchangeable."""

    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["LLaDA2Block"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.word_embeddings.weight"}
    states: ClassVar[States] = EDITING  # 2.0's and 2.1's checkpoints are alike; only 2.1's sampler edits
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["expert_bias"]
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention.query_key_value.weight": tuple([f"attention.{name}.weight" for name in _PROJECTIONS])
    }

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2BaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def trunk(self) -> Trunk:
        """Return the model's parts."""
        m = self.model
        return Trunk(m.word_embeddings, m.layers, m.norm, self.lm_head, m.rotary)

    def linear_count(self) -> int:
        """Return how many linears the architecture has in its blocks."""
        config = self.config
        dense = min(int(config.first_k_dense_replace), int(config.num_hidden_layers))
        layers = int(config.num_experts) + int(config.num_shared_experts > 0)
        mixtures = (int(config.num_hidden_layers) - dense) * (OF_ATTENTION + OF_EXPERT * layers)
        return dense * (OF_ATTENTION + OF_EXPERT) + mixtures

    def block_sites(self, block: LLaDA2Block) -> BlockSites:
        """LLaDA2's linears by role and expert."""
        attn, mlp = block.attention, block.mlp
        of_attention: dict[LinearKey, nn.Linear] = {Role.Q: attn.q_proj, Role.K: attn.k_proj, Role.V: attn.v_proj}
        of_attention[Role.OUT] = attn.dense
        return BlockSites(
            linears={**of_attention, **mlp.linears()},
            inputs={Site.QKV: attn.qkv_input, Site.OUT: attn.out_input, **mlp.inputs()},
            attention=attn.attention,
            norms={Site.QKV: block.input_layernorm, Site.GATE_UP: block.post_attention_layernorm},
            routers=routers_of(mlp),
            experts=experts_of(mlp),
            states=self.states,
        )
