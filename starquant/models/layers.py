"""What the LLaDA and Dream blocks are made of.

Shape suffixes: B batch, L sequence length, D model width, H query heads, K key/value heads, E head width,
F feed-forward width, V vocabulary, N selected positions.

Two kinds of parameter-free modules are seams for quantization, exchanged by `quantized`:
`InputSite` stands where a group of linears reads a shared input, `AttentionCore` is softmax(QK^T)V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.models.buffers import Float32Buffers
from starquant.models.context import Context


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """Return silu(gate) x, or x without a gate."""
    return x if gate is None else F.silu(gate) * x


def site_input(arguments: Sequence[Any]) -> Tensor:
    """Return what stands in front of an input site, from the arguments that it was called with (for hooks)."""
    x, _, gate = (*arguments, None, None)[:3]
    return gated(x, gate)


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

    def forward(self, x_BLD: Tensor, context: Context | None = None, gate_BLD: Tensor | None = None) -> Tensor:
        """Return what the linears read of x, or of silu(gate) x, which a quantizer may compute in its own pass."""
        x_BLD = gated(x_BLD, gate_BLD)
        return x_BLD if self.transform is None else self.transform(x_BLD, context)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and scaled in the input's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Normalise the last dimension."""
        x = x_BLD.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(x_BLD.dtype)


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
    x, rest = x_BHLE[..., : cos.shape[-1]].float(), x_BHLE[..., cos.shape[-1] :]
    first, second = x.chunk(2, dim=-1)
    turned = (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BHLE.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


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
        self.core = AttentionCore()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Split heads, rotate, attend, and return the concatenated heads [B, L, H*E]."""
        q_BHLE = rotate(self._heads(q, self.n_heads), *context.rotary)
        k_BKLE, v_BKLE = rotate(self._heads(k, self.n_kv_heads), *context.rotary), self._heads(v, self.n_kv_heads)
        z_BHLE: Tensor = self.core.attend(q_BHLE, k_BKLE, v_BKLE, context, self)
        return z_BHLE.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor, n: int) -> Tensor:
        heads: Tensor = x.unflatten(-1, (n, self.head_dim))
        return heads.transpose(1, 2)


def select(hidden_BLD: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
    """Keep the hidden states at `positions` (row index, column index), [N, D]; all of them if None."""
    return hidden_BLD if positions is None else hidden_BLD[positions]
