"""What models of block diffusion share: a token sees its own block and all before it, never those behind."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import (
    CommittedCache,
    Context,
    KeyValueCache,
    block_causal,
    block_causal_rows,
    own_block,
    running_positions,
)
from starquant.numerics import States
from starquant.numerics.token_states import BLOCK_DIFFUSION, block_state_indices


class BlockCausalModel(MaskedDiffusionModel):
    """A model whose attention is block-causal.

    Attributes:
        block_length: tokens of a block, the configuration's; `blocks_of` has a sampler's own in its place.
    """

    states: ClassVar[States] = BLOCK_DIFFUSION
    block_length: int

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.block_length = int(config.block_length)

    def attention_mask(self, positions_BL: Tensor, visible_BL: Tensor | None) -> Tensor | None:
        """Return who sees whom: every token its own block and those before it."""
        return block_causal(positions_BL, visible_BL, self.block_length)

    def context(
        self,
        input_ids: Tensor,
        visible_BL: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Context:
        """Return what the blocks of one pass share, as any model's; a pass over one block sees all that it reads."""
        masked_BL, length = input_ids == self.mask_token_id, self.block_length
        if visible_BL is None and position_ids is None and isinstance(cache, CommittedCache):
            return self._context_of_window(input_ids, masked_BL, cache)
        visible_BL = self.real_tokens(input_ids, visible_BL)
        positions_BL = running_positions(input_ids, visible_BL) if position_ids is None else position_ids
        return Context(
            self.trunk().rotary(positions_BL),
            self.attention_mask(positions_BL, visible_BL),
            masked_BL,
            visible_BL,
            cache,
            self.states,
            functools.partial(self.token_states, input_ids, visible_BL, positions_BL),
            functools.partial(own_block, positions_BL, length),
        )

    def _context_of_window(self, input_ids: Tensor, masked_BL: Tensor, cache: CommittedCache) -> Context:
        """Return the context of a pass behind what is kept: nothing but states looks at the columns in front of it."""
        length, window = self.block_length, cache.window
        tables = cache.tables_of_window(self.trunk().rotary, input_ids.device)
        states = functools.partial(self.token_states, input_ids, None, None)
        if window.start // length == (window.stop - 1) // length:
            return Context(tables, None, masked_BL, None, cache, self.states, states)
        mask, own = block_causal_rows(input_ids.shape[1], window, length, input_ids.device)
        return Context(tables, mask, masked_BL, None, cache, self.states, states, lambda: own)

    def token_states(self, input_ids: Tensor, visible_BL: Tensor | None, position_BL: Tensor | None) -> Tensor:
        """Return the states of tokens, as indices on the axis of `states`, [B, L]; arguments as `context`."""
        positions_BL = running_positions(input_ids, visible_BL) if position_BL is None else position_BL
        masked_BL = input_ids == self.mask_token_id
        return block_state_indices(masked_BL, positions_BL, visible_BL, self.block_length, self.states)

    def committed_cache(self, columns: int = 0) -> CommittedCache:
        """Return an empty cache of committed blocks, with room for `columns` from the start."""
        return CommittedCache(columns)

    @contextmanager
    def blocks_of(self, length: int) -> Iterator[None]:
        """Let blocks be of another length while the context lasts."""
        before, self.block_length = self.block_length, length
        try:
            yield
        finally:
            self.block_length = before
