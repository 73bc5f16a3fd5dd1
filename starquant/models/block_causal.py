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
            first, last = (column // length for column in (cache.window.start, cache.window.stop - 1))
            if first == last:
                tables = cache.tables_of_window(self.trunk().rotary, input_ids.device)
                whole = functools.partial(self.token_states, input_ids, None, None)
                return Context(tables, None, masked_BL, None, cache, self.states, whole)
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

    def token_states(self, input_ids: Tensor, visible_BL: Tensor | None, position_BL: Tensor | None) -> Tensor:
        """Return the states of tokens, as indices on the axis of `states`, [B, L]; arguments as `context`."""
        positions_BL = running_positions(input_ids, visible_BL) if position_BL is None else position_BL
        masked_BL = input_ids == self.mask_token_id
        return block_state_indices(masked_BL, positions_BL, visible_BL, self.block_length, self.states)

    def committed_cache(self) -> CommittedCache:
        """Return an empty cache of committed blocks."""
        return CommittedCache()

    @contextmanager
    def blocks_of(self, length: int) -> Iterator[None]:
        """Let blocks be of another length while the context lasts."""
        before, self.block_length = self.block_length, length
        try:
            yield
        finally:
            self.block_length = before
