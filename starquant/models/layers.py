"""What the LLaDA and Dream blocks are made of.

Shape suffixes: B batch, L sequence length, D model width, H query heads, K key/value heads, E head width,
F feed-forward width, V vocabulary, N selected positions.

Three kinds of parameter-free modules are seams for quantization, replaced (never subclassed) by `runtime`:
`InputSite` stands where a group of linears reads a shared input, `AttentionCore` is softmax(QK^T)V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starquant.models.buffers import Float32Buffers
from starquant.numerics import state_indices


class InputSite(Float32Buffers):
    """The shared input of a group of linears (q/k/v, gate/up, ...); the identity in a checkpoint.

    Attributes:
        transform: what a method puts here, its inverse being folded into the linears; called with the input and the
            context, which tells masked tokens from the others. None for nothing.
        state_clip: clip ratios [2] of the quantizer that will stand here, of masked and of other tokens; None for
            one.
    """

    def __init__(self, transform: nn.Module | None = None, state_clip: Tensor | None = None) -> None:
        super().__init__()
        self.transform = transform
        self.state_clip: Tensor | None
        self.register_buffer("state_clip", state_clip)

    def forward(self, x_BLD: Tensor, context: Context | None = None) -> Tensor:
        """Return what the linears read."""
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
    """Apply the rotary embedding to queries or keys, keeping their dtype."""
    x = x_BHLE.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BHLE.dtype)


class AttentionCore(nn.Module):
    """softmax(Q K^T / sqrt(E)) V over all positions, bidirectional; K and V have K <= H heads."""

    def forward(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, H, L, E]; `mask` is boolean [B, 1, 1, L], True where a key may be seen."""
        grouped = q_BHLE.shape[1] != k_BKLE.shape[1]
        return F.scaled_dot_product_attention(q_BHLE, k_BKLE, v_BKLE, attn_mask=mask, enable_gqa=grouped)


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
        if context.cache is not None:
            k_BKLE, v_BKLE = context.cache.renew(self, k_BKLE, v_BKLE)
        z_BHLE = self.core(q_BHLE, k_BKLE, v_BKLE, context.mask)
        return z_BHLE.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor, n: int) -> Tensor:
        return x.unflatten(-1, (n, self.head_dim)).transpose(1, 2)


class KeyValueCache:
    """Keys and values of all columns, layer by layer; a pass over some columns renews theirs and reads the rest.

    Reading keys and values of an earlier denoising step is an approximation: they depend on every token.

    Attributes:
        window: columns that the next pass computes; the first pass computes all.
    """

    def __init__(self) -> None:
        self.window = slice(0, None)
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def renew(self, attention: nn.Module, k_BKWE: Tensor, v_BKWE: Tensor) -> tuple[Tensor, Tensor]:
        """Take the window's keys and values of a layer, and return those of all columns, [B, K, L, E]."""
        if attention not in self._kept:
            self._kept[attention] = k_BKWE.clone(), v_BKWE.clone()
        kept_k, kept_v = self._kept[attention]
        kept_k[:, :, self.window], kept_v[:, :, self.window] = k_BKWE, v_BKWE
        return kept_k, kept_v


class Context:
    """What every block of one forward pass shares: rotary tables, the key mask, and which tokens are [MASK].

    Token states are read off the ids of the pass itself, so that they are those of the current denoising step in
    every batched, padded, guided or likelihood forward, and follow a token that is masked again.

    Attributes:
        rotary: (cos, sin).
        mask: [B, 1, 1, L], True where a key may be seen; None for everywhere.
        masked_BL: True where a token is [MASK].
        state_BL: the same as indices on the axis of `numerics.TokenState`.
        cache: of a pass over some columns; rotary tables and token states are then theirs, key mask and mask ratio
            those of the whole sequence.
    """

    def __init__(
        self, rotary: tuple[Tensor, Tensor], mask: Tensor | None, masked_BL: Tensor, cache: KeyValueCache | None = None
    ) -> None:
        self.rotary, self.mask, self.masked_BL, self.cache = rotary, mask, masked_BL, cache
        self._whole_BL = masked_BL
        if cache is not None:
            cos, sin = rotary
            self.rotary = cos[:, :, cache.window], sin[:, :, cache.window]
            self.masked_BL = masked_BL[:, cache.window]
        self.state_BL = state_indices(self.masked_BL)

    @property
    def mask_ratio_B(self) -> Tensor:
        """Masked share of each row's visible tokens, float32: what a forward pass knows of its denoising step."""
        if self.mask is None:
            return self._whole_BL.float().mean(1)
        visible_BL = self.mask[:, 0, 0]
        return (self._whole_BL & visible_BL).sum(1) / visible_BL.sum(1).clamp_min(1)

    @classmethod
    def build(
        cls,
        rotary: Rotary,
        input_ids_BL: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        mask_token_id: int,
        cache: KeyValueCache | None = None,
    ) -> Context:
        """Make the context; positions count the visible tokens, so padding on either side shifts nothing.

        Raises ValueError when the attention mask is not [B, L].
        """
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != input_ids_BL.shape:
                want, got = tuple(input_ids_BL.shape), tuple(attention_mask.shape)
                raise ValueError(f"attention_mask must have the shape of input_ids, {want}; got {got}")
            visible_BL = attention_mask.bool()
            if not bool(visible_BL.all()):
                mask = visible_BL[:, None, None, :]
                if position_ids is None:
                    position_ids = (visible_BL.long().cumsum(-1) - 1).clamp_(min=0)
        if position_ids is None:
            position_ids = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)[None]
        return cls(rotary(position_ids), mask, input_ids_BL == mask_token_id, cache)


def select(hidden_BLD: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
    """Keep the hidden states at `positions` (row index, column index), [N, D]; all of them if None."""
    return hidden_BLD if positions is None else hidden_BLD[positions]
