"""Queries and keys normalised and turned in one pass, where a packed model runs on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from starquant.kernels import Norm, turn_heads, uses_triton
from starquant.models.layers import Heads, RMSNorm


class FusedHeads(Heads):
    """The same as `Heads`, rounded at the same places; squares are summed in another order."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        head_dim: int,
        rotary: tuple[Tensor, Tensor],
        norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return [B, H, L, E] and [B, K, L, E] of [B, L, H*E] and [B, L, K*E]."""
        if not self._fits(q, k, norms):
            return super().forward(q, k, head_dim, rotary, norms)
        cos_PR, sin_PR = (table.reshape(-1, table.shape[-1]) for table in rotary)
        pair = None if norms is None else (Norm(norms[0].weight, norms[0].eps), Norm(norms[1].weight, norms[1].eps))
        flat = q.reshape(-1, q.shape[-1]), k.reshape(-1, k.shape[-1])
        turned = turn_heads(*flat, head_dim, cos_PR, sin_PR, pair)
        q_BHLE, k_BKLE = (x.unflatten(0, q.shape[:2]).transpose(1, 2) for x in turned)
        return q_BHLE, k_BKLE

    @staticmethod
    def _fits(q: Tensor, k: Tensor, norms: tuple[RMSNorm, RMSNorm] | None) -> bool:
        """Whether the kernel computes what is asked for: 16 bits, gains of the same dtype, one eps."""
        if not uses_triton(q) or q.dtype not in (torch.float16, torch.bfloat16):
            return False
        kinds = {k.dtype} if norms is None else {k.dtype, *(norm.weight.dtype for norm in norms)}
        return kinds == {q.dtype} and (norms is None or norms[0].eps == norms[1].eps)
