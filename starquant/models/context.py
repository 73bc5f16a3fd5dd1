"""What every block of one forward pass shares: rotary tables, who sees whom, token states, keys and values kept.

Shape suffixes: B batch, L sequence length, W columns of a pass's window, K key/value heads, E head width, N tokens that
an expert is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from starquant.numerics import BIDIRECTIONAL, States, TokenState, state_indices
from starquant.numerics.token_states import copy_indices


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

    A pass computes its window and reads what is kept in front of it. It writes those of all its columns into the
    layer's buffer; the next window begins behind the ones that are final then, and writes over the others.

    Args:
        columns: that all passes together will compute, for which buffers have room from the start; they grow beyond.

    Attributes:
        keep: columns that are final once the next pass has computed its window.
    """

    def __init__(self, columns: int = 0) -> None:
        super().__init__()
        self.keep, self._columns = 0, columns
        self._tables: tuple[slice, tuple[Tensor, Tensor]] | None = None

    def tables_of_window(
        self, rotary: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the rotary tables of the window's columns, made once for all passes over a block."""
        if self._tables is None or self._tables[0] != self.window:
            self._tables = self.window, rotary(torch.arange(self.window.start, self.window.stop, device=device)[None])
        return self._tables[1]

    def ahead(self, start: int, stop: int) -> None:
        """Let the next pass compute all that is not final up to column `stop`; what stands before `start` then is."""
        self.window, self.keep = slice(self.keep, stop), start

    @property
    def commits(self) -> bool:
        """Whether the pass finishes blocks: some of its columns are read by queries of others from now on."""
        return self.keep > self.window.start

    def kept(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        """Return a layer's final keys and values, [B, K, keep, E]; they are the buffer's memory."""
        k_BKLE, v_BKLE = self._kept[attention]
        return k_BKLE[:, :, : self.keep], v_BKLE[:, :, : self.keep]

    def renew(self, attention: nn.Module, k_BKWE: Tensor, v_BKWE: Tensor) -> tuple[Tensor, Tensor]:
        """Take the window's keys and values of a layer, and return those of all columns up to its end."""
        stop = self.window.stop
        k_BKLE, v_BKLE = self._kept.get(attention, (None, None))
        if k_BKLE is None or v_BKLE is None or k_BKLE.shape[2] < stop:
            k_BKLE, v_BKLE = self._room(k_BKWE, k_BKLE), self._room(v_BKWE, v_BKLE)
            self._kept[attention] = k_BKLE, v_BKLE
        k_BKLE[:, :, self.window], v_BKLE[:, :, self.window] = k_BKWE, v_BKWE
        return k_BKLE[:, :, :stop], v_BKLE[:, :, :stop]

    def _room(self, new_BKWE: Tensor, old_BKLE: Tensor | None) -> Tensor:
        """Return a buffer of what a window gives, with room up to its end at least, that holds what an old one held."""
        begin, old = self.window.start, 0 if old_BKLE is None else old_BKLE.shape[2]
        rows, heads, _, width = new_BKWE.shape
        room_BKLE = new_BKWE.new_empty(rows, heads, max(self._columns, self.window.stop, 2 * old), width)
        if old_BKLE is not None:
            room_BKLE[:, :, :begin] = old_BKLE[:, :, :begin]
        return room_BKLE


class Context:
    """What every block of one forward pass shares.

    Token states are read off the ids of the pass itself, so that they are those of the current denoising step in
    every batched, padded, guided or likelihood forward, and follow a token that is masked again.

    Args:
        rotary: (cos, sin) of the columns that the pass computes, or of all of them.
        mask: who sees whom, over all columns; its rows may be those of the columns that the pass computes.
        masked_BL: True where a token is [MASK], of all columns.
        visible_BL: False on padding; None where nothing is padded.
        cache: of a pass over some columns.
        states: that the model declares.
        of_state: makes the states of all columns, [B, L], when somebody asks; None for masked and not.
        of_own: makes the mask of keys in a query's own block, of the same shape, likewise; None where there are none.

    Attributes:
        rotary: (cos, sin).
        mask: boolean, broadcasts to [B, H, W, L]: True where a query (row) may see a key (column); None for everywhere.
        states: that the model declares, the order of `state_BL`.
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
        states: States = BIDIRECTIONAL,
        of_state: Callable[[], Tensor] | None = None,
        of_own: Callable[[], Tensor] | None = None,
    ) -> None:
        self.rotary, self.mask, self.cache, self.states = rotary, mask, cache, states
        self.tokens_N: Tensor | None = None
        self._whole: Context | None = None  # of the pass that an expert's tokens are of
        self._all_BL, self._visible_BL, self._of_state, self._of_own = masked_BL, visible_BL, of_state, of_own
        self._all_state_BL: Tensor | None = None
        self._masked_BL: Tensor | None = masked_BL
        if cache is not None:
            self.rotary = _of_window(rotary, masked_BL.shape[1], cache.window)
            self._masked_BL = masked_BL[:, cache.window]
            if mask is not None and mask.shape[-2] > 1:
                self.mask = _rows_of_window(mask, cache.window)
        self._state_BL = state_indices(self._masked_BL) if of_state is None else None

    def routed(self, tokens_N: Tensor) -> Context:
        """Return the context of the tokens that an expert is given, as one row [1, N].

        Args:
            tokens_N: their places among all B * L tokens of the pass, row by row.
        """
        part = Context.__new__(Context)
        part.__dict__.update(self.__dict__)
        part.tokens_N, part._whole = tokens_N, self
        part._masked_BL = part._state_BL = None
        return part

    def of_tokens(self, x_BL: Tensor) -> Tensor:
        """Return what belongs to this context's tokens of something given for all of the pass: [B, L], or [1, N]."""
        return x_BL if self.tokens_N is None else x_BL.flatten()[self.tokens_N][None]

    @property
    def masked_BL(self) -> Tensor:
        """True where a token is [MASK]."""
        if self._masked_BL is None:
            assert self._whole is not None
            self._masked_BL = self.of_tokens(self._whole.masked_BL)
        return self._masked_BL

    @property
    def state_BL(self) -> Tensor:
        """States of the tokens, as indices on the axis of `states`."""
        if self._state_BL is None:
            if self._whole is not None:
                self._state_BL = self.of_tokens(self._whole.state_BL)
            else:
                state_BL = self._states_of_all()
                self._state_BL = state_BL if self.cache is None else state_BL[:, self.cache.window]
        return self._state_BL

    def _states_of_all(self) -> Tensor:
        if self._all_state_BL is None:
            self._all_state_BL = state_indices(self._all_BL) if self._of_state is None else self._of_state()
        return self._all_state_BL

    @functools.cached_property
    def own_mask(self) -> Tensor | None:
        """True where a key is of a query's own block, as `mask`; None where each key that is computed is of it."""
        if self._of_own is None:
            return None
        own = self._of_own()
        return own if self.cache is None else _rows_of_window(own, self.cache.window)

    @property
    def mask_ratio_B(self) -> Tensor:
        """Masked share of each row's visible tokens, float32: what a forward pass knows of its denoising step.

        In block diffusion finished blocks do not count. An expert's tokens are of several rows: its context has no
        ratio; read it off the whole pass.
        """
        assert self.tokens_N is None, "the tokens of an expert are of several rows"
        counted_BL = self._visible_BL
        if TokenState.CONTEXT in self.states:
            denoised_BL = self._states_of_all() != self.states.index(TokenState.CONTEXT)
            counted_BL = denoised_BL if counted_BL is None else denoised_BL & counted_BL
        if counted_BL is None:
            return self._all_BL.float().mean(1)
        return (self._all_BL & counted_BL).sum(1) / counted_BL.sum(1).clamp_min(1)


def _of_window(rotary: tuple[Tensor, Tensor], columns: int, window: slice) -> tuple[Tensor, Tensor]:
    """Return the tables of a window's columns, which may be all that there is of them."""
    cos, sin = rotary
    return rotary if cos.shape[2] < columns else (cos[:, :, window], sin[:, :, window])


def _rows_of_window(mask_BHLL: Tensor, window: slice) -> Tensor:
    """Return the rows of a window's queries, which may be all that there are of them."""
    return mask_BHLL if mask_BHLL.shape[-2] < mask_BHLL.shape[-1] else mask_BHLL[:, :, window]


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
    block_BL, copy_BL = positions_BL // block_length, copy_indices(positions_BL)
    seen_BL = copy_BL if visible_BL is None else copy_BL.masked_fill(~visible_BL, -1)
    last_BL = copy_BL == seen_BL.amax(1, keepdim=True)
    before_BLL = (block_BL[:, None, :] < block_BL[:, :, None]) & last_BL[:, None]
    sees_BLL = before_BLL | _same_block(block_BL, copy_BL)
    if visible_BL is not None:
        itself_LL = torch.eye(positions_BL.shape[1], dtype=torch.bool, device=positions_BL.device)
        sees_BLL = sees_BLL & visible_BL[:, None] | itself_LL
    return sees_BLL[:, None]


def block_causal_rows(columns: int, window: slice, block_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (`block_causal`, `own_block`) of unpadded columns, the rows of a window alone: each [1, 1, W, L]."""
    block_L = torch.arange(columns, device=device) // block_length
    block_W1 = block_L[window, None]
    return (block_L <= block_W1)[None, None], (block_L == block_W1)[None, None]


def own_block(positions_BL: Tensor, block_length: int) -> Tensor:
    """Return where a key is of the query's own block and copy, [B, 1, L, L]; arguments as `block_causal`."""
    return _same_block(positions_BL // block_length, copy_indices(positions_BL))[:, None]


def _same_block(block_BL: Tensor, copy_BL: Tensor) -> Tensor:
    return (block_BL[:, None, :] == block_BL[:, :, None]) & (copy_BL[:, None, :] == copy_BL[:, :, None])


def running_positions(ids_BL: Tensor, visible_BL: Tensor | None) -> Tensor:
    """Return position ids [B, L] that count the visible tokens, so that padding on either side shifts nothing."""
    if visible_BL is None:
        return torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
    return (visible_BL.long().cumsum(-1) - 1).clamp_(min=0)
