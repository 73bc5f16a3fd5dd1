"""The projections around the attention, under the names that most published checkpoints use."""

from __future__ import annotations

from torch import Tensor, nn

from starquant.models.context import Context
from starquant.models.layers import InputSite, RMSNorm, RotaryAttention, added
from starquant.models.roles import LinearKey, Role, Site, SiteKey


class ProjectedAttention(nn.Module):
    """Attention between q_proj, k_proj, v_proj and o_proj.

    Args:
        width: of the model.
        heads: of queries, and of keys and values.
        head_dim: of a head; heads * head_dim need not be the width.
        bias: whether queries, keys and values have one.
    """

    def __init__(self, width: int, heads: tuple[int, int], head_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, n * head_dim, bias=bias) for n in (heads[0], heads[1], heads[1])
        )
        self.o_proj = nn.Linear(heads[0] * head_dim, width, bias=False)
        self.attention = RotaryAttention(*heads, head_dim)
        self.qkv_input, self.out_input = InputSite(), InputSite()

    @property
    def head_norms(self) -> tuple[RMSNorm, RMSNorm] | None:
        """The norms of queries and keys per head; None where there are none."""
        return None

    def forward(self, x_BLD: Tensor, context: Context, norm: nn.Module) -> Tensor:
        """Add to the residual stream what its norm attends to, where the context's mask shows it."""
        h = self.qkv_input(x_BLD, context, norm)
        z = self.attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), context, self.head_norms)
        return added(x_BLD, self.o_proj, self.out_input(z, context))

    def linears(self) -> dict[LinearKey, nn.Linear]:
        """Return the linears by role."""
        return {Role.Q: self.q_proj, Role.K: self.k_proj, Role.V: self.v_proj, Role.OUT: self.o_proj}

    def inputs(self) -> dict[SiteKey, InputSite]:
        """Return the input sites."""
        return {Site.QKV: self.qkv_input, Site.OUT: self.out_input}


class NormedAttention(ProjectedAttention):
    """The same with queries and keys normalised per head in front of the rotary embedding, by q_norm and k_norm.

    Args:
        width: of the model.
        heads: of queries, and of keys and values.
        head_dim: of a head.
        eps: of the norms.
    """

    def __init__(self, width: int, heads: tuple[int, int], head_dim: int, eps: float) -> None:
        super().__init__(width, heads, head_dim)
        self.q_norm, self.k_norm = RMSNorm(head_dim, eps), RMSNorm(head_dim, eps)

    @property
    def head_norms(self) -> tuple[RMSNorm, RMSNorm]:
        """The norms of queries and of keys."""
        return self.q_norm, self.k_norm
