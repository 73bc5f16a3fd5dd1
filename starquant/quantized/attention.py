"""Attention whose operands Q, K, P = softmax(QK^T / sqrt(E)) and V each have their own bits.

Q, K and V have one scale a token and head; P has one a query and head, on an unsigned grid (it is never negative).
Q's grid is symmetric and unclipped, that of K and V is theirs to choose (QuaRot's authors: asymmetric, clipped).
V may have static scales instead, one a head and channel, shared by all tokens. Methods hand transforms, clip ratios and
static scales to an attention first; the quantizers that come later take them over.

In block diffusion K and V may be rounded at commit: a query reads those of its own block as they are, and those of
finished blocks as they were rounded once, whether they are kept or computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from starquant.errors import CheckpointError
from starquant.models.buffers import Float32Buffers
from starquant.models.context import CommittedCache, Context
from starquant.models.layers import AttentionCore, RotaryAttention
from starquant.numerics import PerToken, QuantFormat, SqnrMeter, fake_quantize

if TYPE_CHECKING:
    from starquant.config.bits import AttentionSpec  # pydantic, which a bare machine lacks

OPERANDS = ("q", "k", "p", "v")
#: Operands that may have clip ratios of their own, in the order of `clip_OE`.
CLIPPED = ("q", "k", "v")


@dataclass(frozen=True)
class KeyValueGrid:
    """The grid of keys and values, beside their bits."""

    symmetric: bool = True
    clip_ratio: float = 1.0

    @classmethod
    def of(cls, attention: AttentionSpec) -> KeyValueGrid:
        """Return that of a run's bits."""
        return cls(attention.kv_symmetric, attention.kv_clip_ratio)


COMMON = KeyValueGrid()


def operand_format(operand: str, bits: int, kv: KeyValueGrid = COMMON) -> QuantFormat:
    """Return the grid of one operand: symmetric for q; unsigned for the probabilities p; `kv` for k and v."""
    if operand in ("k", "v"):
        return QuantFormat(bits, kv.symmetric, PerToken(), kv.clip_ratio)
    return QuantFormat(bits, symmetric=operand != "p", granularity=PerToken())


def quantize_statically(v_BKLE: Tensor, scale_KE: Tensor, fmt: QuantFormat) -> Tensor:
    """Round V to a symmetric grid with one scale a head and channel: s clamp(round(v / s), qmin, qmax)."""
    scale = scale_KE[:, None].to(device=v_BKLE.device, dtype=torch.float32)
    codes = torch.round(v_BKLE.float() / scale).clamp_(fmt.qmin, fmt.qmax)
    return codes.mul_(scale).to(v_BKLE.dtype)


class QuantizedAttentionCore(Float32Buffers, AttentionCore):
    """Scaled dot-product attention on quantized operands.

    Args:
        bits: bits of "q", "k", "p", "v"; 16 leaves an operand alone.
        qk_transform: transform of queries and keys after the rotary embedding, which leaves their products unchanged:
            orthogonal, or one that has `queries` of its own; None for none.
        v_scale_KE: static scales of V; None for one a token, computed on the fly.
        v_transform: maps the concatenated value heads [B, L, K*E] in front of everything else; None for nothing.
        clip_OE: clip ratios [3, 2] of q, k and v, of the largest and of the smallest number; None for one.
        kv: grid of keys and values; static scales of V are of symmetric, unclipped ones.
        kv_at: when keys and values are rounded: at every "read", or at "commit" of their block.
    """

    def __init__(
        self,
        bits: dict[str, int],
        qk_transform: nn.Module | None = None,
        v_scale_KE: Tensor | None = None,
        v_transform: nn.Module | None = None,
        clip_OE: Tensor | None = None,
        kv: KeyValueGrid = COMMON,
        kv_at: str = "read",
    ) -> None:
        super().__init__()
        self.kv, self.kv_at = kv, kv_at
        self.formats = {name: operand_format(name, bits[name], kv) for name in OPERANDS}
        self.qk_transform, self.v_transform = qk_transform, v_transform
        self.v_scale_KE: Tensor | None
        self.register_buffer("v_scale_KE", v_scale_KE)
        self.clip_OE: Tensor | None
        self.register_buffer("clip_OE", clip_OE)
        self.meters: dict[str, SqnrMeter] | None = None

    def forward(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, H, L, E], as `AttentionCore`."""
        q, k, v = self._transformed(q_BHLE, k_BKLE, v_BKLE)
        return self._product(q, self._quantize("k", k), self._quantize("v", v), mask)

    def attend(self, q_BHWE: Tensor, k_BKWE: Tensor, v_BKWE: Tensor, context: Context, layer: nn.Module) -> Tensor:
        """Attend in a pass, as `AttentionCore`; what a cache keeps is transformed and rounded already."""
        if self.kv_at == "read" and context.cache is None:
            return super().attend(q_BHWE, k_BKWE, v_BKWE, context, layer)
        q, k, v = self._transformed(q_BHWE, k_BKWE, v_BKWE)
        if self.kv_at == "commit":
            return self._product(q, *at_commit(self._quantize, k, v, context, layer))
        assert context.cache is not None
        # a token is rounded by itself: to the same number however often it is read
        k, v = context.cache.renew(layer, self._quantize("k", k), self._quantize("v", v))
        return self._product(q, k, v, context.mask)

    def _transformed(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qk_transform is not None:
            of_queries = getattr(self.qk_transform, "queries", self.qk_transform)
            q_BHLE, k_BKLE = of_queries(q_BHLE), self.qk_transform(k_BKLE)
        if self.v_transform is not None:
            heads = v_BKLE.shape[1]
            v_BKLE = self.v_transform(v_BKLE.transpose(1, 2).flatten(2)).unflatten(2, (heads, -1)).transpose(1, 2)
        return q_BHLE, k_BKLE, v_BKLE

    def _product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q = self._quantize("q", q)
        if not self.formats["p"].quantizes:
            return super().forward(q, k, v, mask)
        groups = q.shape[1] // k.shape[1]
        p_BHLL = self._quantize("p", probabilities(q, k, mask))
        return p_BHLL.to(v.dtype) @ v.repeat_interleave(groups, dim=1)

    def _quantize(self, name: str, x: Tensor) -> Tensor:
        fmt = self.formats[name]
        if name == "v" and self.v_scale_KE is not None and fmt.quantizes:
            quantized = quantize_statically(x, self.v_scale_KE, fmt)
        elif self.clip_OE is not None and name in CLIPPED:
            clip_E = self.clip_OE[CLIPPED.index(name)].to(x.device)
            quantized = fake_quantize(x, fmt, clip=clip_E.expand(*x.shape[:-1], 2))
        else:
            quantized = fake_quantize(x, fmt)
        if self.meters is not None and fmt.quantizes:
            self.meters[name].update(x, quantized)
        return quantized

    def validate(self, name: str) -> None:
        """Judge static scales of V and clip ratios that were loaded.

        Raises:
            CheckpointError: scales that are not above 0 and finite, ratios that are not above 0 and at most 1.
        """
        scale, clip = self.v_scale_KE, self.clip_OE
        if scale is not None and not bool(((scale > 0) & scale.isfinite()).all()):
            raise CheckpointError(f"{name}.v_scale_KE: scales must be finite and above 0")
        if clip is not None and not bool(((clip > 0) & (clip <= 1)).all()):
            raise CheckpointError(f"{name}.clip_OE: clip ratios must be above 0, at most 1")

    def extra_repr(self) -> str:
        """Show the bits."""
        return ", ".join(f"{name}={fmt.bits}" for name, fmt in self.formats.items())


def at_commit(
    quantize: Callable[[str, Tensor], Tensor], k_BKWE: Tensor, v_BKWE: Tensor, context: Context, layer: nn.Module
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the keys, values and mask of a pass in which a query reads its own block's as they are, others' rounded.

    Where a pass computes finished blocks too, their keys and values stand there twice, rounded and as they are, each
    seen by other queries.

    Args:
        quantize: rounds "k" or "v".
        k_BKWE: keys of the columns that the pass computes, transformed.
        v_BKWE: values likewise.
        context: of the pass; keeps what is rounded in a cache of committed blocks.
        layer: under which they are kept.
    """
    cache = context.cache
    committed = cache if isinstance(cache, CommittedCache) else None
    if cache is not None and committed is None:  # of all columns, some of an earlier pass
        k_BKWE, v_BKWE = cache.renew(layer, k_BKWE, v_BKWE)
    own = context.own_mask
    if own is None and committed is not None and not committed.commits:  # one block behind what is kept
        return (*committed.renew(layer, k_BKWE, v_BKWE), None)
    k, v = quantize("k", k_BKWE), quantize("v", v_BKWE)
    if committed is not None:
        k, v = committed.renew(layer, k, v)
    assert own is not None and context.mask is not None, "block-causal attention says who sees whom"
    earlier, own = context.mask & ~own, own[..., own.shape[-1] - k_BKWE.shape[2] :]
    return torch.cat((k, k_BKWE), 2), torch.cat((v, v_BKWE), 2), torch.cat((earlier, own), -1)


def probabilities(q_BHLE: Tensor, k_BKLE: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(QK^T / sqrt(E)) in float32, [B, H, L, L]; K may have fewer heads than Q."""
    k_BHLE = k_BKLE.repeat_interleave(q_BHLE.shape[1] // k_BKLE.shape[1], dim=1)
    scores_BHLL = q_BHLE.float() @ k_BHLE.float().transpose(-1, -2) / math.sqrt(q_BHLE.shape[-1])
    if mask is not None:
        scores_BHLL = scores_BHLL.masked_fill(~mask, -torch.inf)
    return scores_BHLL.softmax(-1)


def transform_queries_and_keys(attention: RotaryAttention, transform: nn.Module) -> None:
    """Make an attention transform its queries and keys after the rotary embedding."""
    _replace_core(attention, qk_transform=transform)


def transform_values(attention: RotaryAttention, transform: nn.Module) -> None:
    """Make an attention map its concatenated value heads, [B, L, K*E]."""
    _replace_core(attention, v_transform=transform)


def set_static_value_scales(attention: RotaryAttention, scale_KE: Tensor) -> None:
    """Make an attention quantize V with static scales, once V is quantized."""
    _replace_core(attention, v_scale_KE=scale_KE)


def set_operand_clips(attention: RotaryAttention, clip_OE: Tensor) -> None:
    """Make an attention clip queries, keys and values, once they are quantized, at ratios [3, 2] of both their ends."""
    _replace_core(attention, clip_OE=clip_OE)


def transforms_and_scales(core: nn.Module) -> dict[str, Any]:
    """Return what has been handed to an attention so far, as `QuantizedAttentionCore` takes it."""
    return {name: getattr(core, name, None) for name in ("qk_transform", "v_scale_KE", "v_transform", "clip_OE")}


def operand_transforms(core: nn.Module) -> dict[str, str | None]:
    """Return what each operand passes through before it is rounded, in words; None for nothing."""
    handed = transforms_and_scales(core)
    words = {name: None if handed[name] is None else str(handed[name]) for name in ("qk_transform", "v_transform")}
    return {"q": words["qk_transform"], "k": words["qk_transform"], "v": words["v_transform"], "p": None}


def _replace_core(attention: RotaryAttention, **handed: Any) -> None:
    formats = getattr(attention.core, "formats", {})
    bits = {name: formats[name].bits for name in formats} or dict.fromkeys(OPERANDS, 16)
    kv, kv_at = getattr(attention.core, "kv", COMMON), getattr(attention.core, "kv_at", "read")
    handed = transforms_and_scales(attention.core) | handed
    attention.core = QuantizedAttentionCore(bits, **handed, kv=kv, kv_at=kv_at)
