"""What every block of one forward pass shares: rotary tables, who sees whom, token states, keys and values kept.

Shape suffixes: B batch, L sequence length, W columns of a pass's window, K key/value heads, E head width, N tokens that
an expert is given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from starquant.numerics import state_indices


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


class CommittedCache(KeyValueCache):
    """Keys and values of a committed prefix, which sees nothing behind it: reading them again is exact.

    A pass computes its window and reads what is kept in front of it; of its own columns it keeps those before `keep`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keep = 0

    def ahead(self, start: int, stop: int) -> None:
        """Let the next pass compute all that is not kept up to column `stop`, and keep what stands before `start`."""
        self.window, self.keep = slice(self.keep, stop), start

    def renew(self, attention: nn.Module, k_BKWE: Tensor, v_BKWE: Tensor) -> tuple[Tensor, Tensor]:
        """Take the window's keys and values of a layer, and return those of all columns up to its end."""
        if (kept := self._kept.get(attention)) is not None:
            k_BKWE, v_BKWE = (torch.cat(pair, 2) for pair in zip(kept, (k_BKWE, v_BKWE), strict=True))
        if self.keep > self.window.start:
            self._kept[attention] = k_BKWE[:, :, : self.keep].clone(), v_BKWE[:, :, : self.keep].clone()
        return k_BKWE, v_BKWE


class Context:
    """What every block of one forward pass shares.

    Token states are read off the ids of the pass itself, so that they are those of the current denoising step in
    every batched, padded, guided or likelihood forward, and follow a token that is masked again.

    Attributes:
        rotary: (cos, sin).
        mask: boolean, broadcasts to [B, H, W, L]: True where a query (row) may see a key (column); None for everywhere.
        masked_BL: True where a token is [MASK].
        state_BL: the same as indices on the axis of `numerics.TokenState`.
        cache: of a pass over some columns; rotary tables, the mask's rows and token states are then theirs, the mask
            ratio is that of the whole sequence.
        tokens_N: in what an expert is given (`routed`), the places of its tokens among all B * L; None for all.
    """

    def __init__(
        self,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        masked_BL: Tensor,
        visible_BL: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> None:
        self.rotary, self.mask, self.masked_BL, self.cache = rotary, mask, masked_BL, cache
        self.tokens_N: Tensor | None = None
        self._whole_BL, self._visible_BL = masked_BL, visible_BL
        if cache is not None:
            cos, sin = rotary
            self.rotary = cos[:, :, cache.window], sin[:, :, cache.window]
            self.masked_BL = masked_BL[:, cache.window]
            if mask is not None and mask.shape[-2] > 1:
                self.mask = mask[:, :, cache.window]
        self.state_BL = state_indices(self.masked_BL)

    def routed(self, tokens_N: Tensor) -> Context:
        """Return the context of the tokens that an expert is given, as one row [1, N].

        Args:
            tokens_N: their places among all B * L tokens of the pass, row by row.
        """
        part = Context(self.rotary, self.mask, self.masked_BL.flatten()[tokens_N][None])
        part.tokens_N = tokens_N
        return part

    def of_tokens(self, x_BL: Tensor) -> Tensor:
        """Return what belongs to this context's tokens of something given for all of the pass: [B, L], or [1, N]."""
        return x_BL if self.tokens_N is None else x_BL.flatten()[self.tokens_N][None]

    @property
    def mask_ratio_B(self) -> Tensor:
        """Masked share of each row's visible tokens, float32: what a forward pass knows of its denoising step.

        An expert's tokens are of several rows: its context has no ratio; read it off the whole pass.
        """
        assert self.tokens_N is None, "the tokens of an expert are of several rows"
        if self._visible_BL is None:
            return self._whole_BL.float().mean(1)
        return (self._whole_BL & self._visible_BL).sum(1) / self._visible_BL.sum(1).clamp_min(1)


def bidirectional(visible_BL: Tensor | None) -> Tensor | None:
    """Return the mask in which every token sees every real one, [B, 1, 1, L]; None where nothing is padded."""
    return None if visible_BL is None else visible_BL[:, None, None]


def block_causal(positions_BL: Tensor, visible_BL: Tensor | None, block_length: int) -> Tensor:
    """Return the mask in which a token sees its own block and all before it, [B, 1, L, L]; padding sees itself.

    Positions that begin again are those of another copy of the text, as in the layout [noisy ; clean] of training: a
    token then sees its own block in its own copy, and those before it in the last one.

    Args:
        positions_BL: of every token; blocks count from position 0.
        visible_BL: False on padding; None where nothing is padded.
        block_length: tokens of a block.
    """
    block_BL, copy_BL = positions_BL // block_length, torch.zeros_like(positions_BL)
    copy_BL[:, 1:] = (positions_BL[:, 1:] <= positions_BL[:, :-1]).cumsum(1)
    seen_BL = copy_BL if visible_BL is None else copy_BL.masked_fill(~visible_BL, -1)
    last_BL = copy_BL == seen_BL.amax(1, keepdim=True)
    before_BLL = (block_BL[:, None, :] < block_BL[:, :, None]) & last_BL[:, None]
    own_BLL = (block_BL[:, None, :] == block_BL[:, :, None]) & (copy_BL[:, None, :] == copy_BL[:, :, None])
    sees_BLL = before_BLL | own_BLL
    if visible_BL is not None:
        itself_LL = torch.eye(positions_BL.shape[1], dtype=torch.bool, device=positions_BL.device)
        sees_BLL = sees_BLL & visible_BL[:, None] | itself_LL
    return sees_BLL[:, None]


def running_positions(ids_BL: Tensor, visible_BL: Tensor | None) -> Tensor:
    """Return position ids [B, L] that count the visible tokens, so that padding on either side shifts nothing."""
    if visible_BL is None:
        return torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
    return (visible_BL.long().cumsum(-1) - 1).clamp_(min=0)
