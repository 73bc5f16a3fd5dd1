"""A block of pre-norm attention and feed-forward under the names that most published checkpoints use."""

from __future__ import annotations

from torch import Tensor, nn

from starquant.models.attention import ProjectedAttention
from starquant.models.context import Context
from starquant.models.experts import Mixture, experts_of, routers_of
from starquant.models.feed_forward import FeedForward
from starquant.models.layers import RMSNorm
from starquant.models.roles import BlockSites, Site
from starquant.numerics import BIDIRECTIONAL, States


class PreNormBlock(nn.Module):
    """Attention, and experts or SwiGLU, each behind a norm: self_attn, mlp, input_layernorm, post_attention_layernorm.

    Args:
        attention: with its projections.
        mlp: the feed-forward layer.
        width: of the model.
        eps: of the norms.
    """

    def __init__(self, attention: ProjectedAttention, mlp: Mixture | FeedForward, width: int, eps: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Add attention and feed-forward to the residual stream."""
        x_BLD = self.self_attn(x_BLD, context, self.input_layernorm)
        y_BLD: Tensor = self.mlp(x_BLD, context, self.post_attention_layernorm)
        return y_BLD

    def sites(self, states: States = BIDIRECTIONAL) -> BlockSites:
        """Return the linears by role and expert; `states` are the model's."""
        attn, mlp = self.self_attn, self.mlp
        return BlockSites(
            linears={**attn.linears(), **mlp.linears()},
            inputs={**attn.inputs(), **mlp.inputs()},
            attention=attn.attention,
            norms={Site.QKV: self.input_layernorm, Site.GATE_UP: self.post_attention_layernorm},
            routers=routers_of(mlp),
            experts=experts_of(mlp),
            states=states,
        )
