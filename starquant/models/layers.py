"""What the LLaDA and Dream blocks are made of.

Shape suffixes: B batch, L sequence length, D model width, H query heads, K key/value heads, E head width,
F feed-forward width, V vocabulary, N selected positions.

Three kinds of parameter-free modules are seams for quantization, exchanged by `quantized`:
`InputSite` stands where a group of linears reads a shared input, `Heads` is what queries and keys pass before they
meet, `AttentionCore` is softmax(QK^T)V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.models.buffers import Float32Buffers
from starquant.models.context import Context
from starquant.numerics import rms_norm

#: What stands between x and an input site: the gate of SwiGLU, a norm; None for nothing.
Front = Tensor | nn.Module | None


def in_front(x: Tensor, front: Front) -> Tensor:
    """Return silu(gate) x of a gate, norm(x) of a norm, else x."""
    if front is None:
        return x
    normed: Tensor = F.silu(front) * x if isinstance(front, Tensor) else front(x)
    return normed


def site_input(arguments: Sequence[Any]) -> Tensor:
    """Return what stands in front of an input site, from the arguments that it was called with (for hooks)."""
    x, _, front = (*arguments, None, None)[:3]
    return in_front(x, front)


def added(x_BLD: Tensor, linear: nn.Module, h: Any) -> Tensor:
    """Return x + linear(h), the residual stream after a sublayer; a linear that `adds` writes nothing but the sum."""
    y_BLD: Tensor = linear(h, x_BLD) if getattr(type(linear), "adds", False) else x_BLD + linear(h)
    return y_BLD


class InputSite(Float32Buffers):
    """The shared input of a group of linears (q/k/v, gate/up, ...); the identity in a checkpoint.

    Attributes:
        transform: what a method puts here, its inverse being folded into the linears; called with the input and the
            context, which tells masked tokens from the others. None for nothing.
        state_clip: clip ratios of the quantizer that will stand here, of each token state: [S], or [S, 2] with one of
            the largest number and one of the smallest; None for one.
    """

    def __init__(self, transform: nn.Module | None = None, state_clip: Tensor | None = None) -> None:
        super().__init__()
        self.transform = transform
        self.state_clip: Tensor | None
        self.register_buffer("state_clip", state_clip)

    def forward(self, x_BLD: Tensor, context: Context | None = None, front: Front = None) -> Tensor:
        """Return what the linears read of x behind a norm or SwiGLU, which a quantizer may compute in its own pass."""
        x_BLD = in_front(x_BLD, front)
        return x_BLD if self.transform is None else self.transform(x_BLD, context)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and scaled in the input's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x_BLD, self.weight, self.eps)


class Rotary(nn.Module):
    """Rotary position embedding in the half-split layout, always computed in float32."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, position_ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [B, 1, L, E]."""
        # Built on the fly: a registered buffer would be lost when the model is created on the meta device.
        even = torch.arange(0, self.head_dim, 2, device=position_ids_BL.device, dtype=torch.float32)
        inv_freq = 1.0 / (self.theta ** (even / self.head_dim))
        angle = position_ids_BL[:, None, :, None].float() * inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()


def rotate(x_BHLE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to queries or keys, keeping their dtype; what is beyond its tables passes."""
    if (width := cos.shape[-1]) < x_BHLE.shape[-1]:
        return torch.cat((rotate(x_BHLE[..., :width], cos, sin), x_BHLE[..., width:]), -1)
    x = x_BHLE.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BHLE.dtype)


class Heads(nn.Module):
    """Queries and keys split into heads, normalised per head where there are norms, and turned by their positions."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        head_dim: int,
        rotary: tuple[Tensor, Tensor],
        norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return [B, H, L, E] and [B, K, L, E] of [B, L, H*E] and [B, L, K*E]."""
        heads = [x.unflatten(-1, (-1, head_dim)) for x in (q, k)]
        if norms is not None:
            heads = [norm(x) for norm, x in zip(norms, heads, strict=True)]
        q_BHLE, k_BKLE = (rotate(x.transpose(1, 2), *rotary) for x in heads)
        return q_BHLE, k_BKLE


class AttentionCore(nn.Module):
    """softmax(Q K^T / sqrt(E)) V over the positions that `mask` shows; K and V have K <= H heads."""

    def forward(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, H, L, E]; `mask` is boolean and broadcasts to [B, H, L, L], True where a key may be seen."""
        grouped = q_BHLE.shape[1] != k_BKLE.shape[1]
        return F.scaled_dot_product_attention(q_BHLE, k_BKLE, v_BKLE, attn_mask=mask, enable_gqa=grouped)

    def attend(self, q_BHWE: Tensor, k_BKWE: Tensor, v_BKWE: Tensor, context: Context, layer: nn.Module) -> Tensor:
        """Attend in a pass, which may read keys and values of other columns from its cache, kept under `layer`."""
        if context.cache is not None:
            k_BKWE, v_BKWE = context.cache.renew(layer, k_BKWE, v_BKWE)
        z_BHWE: Tensor = self(q_BHWE, k_BKWE, v_BKWE, context.mask)
        return z_BHWE


class RotaryAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention between the projections: [B, L, .] in and out."""

    def __init__(self, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.heads, self.core = Heads(), AttentionCore()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, norms: tuple[RMSNorm, RMSNorm] | None = None
    ) -> Tensor:
        """Split heads, normalise those of q and k if asked, rotate, attend, and return the heads [B, L, H*E]."""
        q_BHLE, k_BKLE = self.heads(q, k, self.head_dim, context.rotary, norms)
        v_BKLE: Tensor = v.unflatten(-1, (self.n_kv_heads, self.head_dim)).transpose(1, 2)
        z_BHLE: Tensor = self.core.attend(q_BHLE, k_BKLE, v_BKLE, context, self)
        return z_BHLE.transpose(1, 2).flatten(2)


def select(hidden_BLD: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
    """Keep the hidden states at `positions` (row index, column index), [N, D]; all of them if None."""
    return hidden_BLD if positions is None else hidden_BLD[positions]
