"""What models of block diffusion share: a token sees its own block and all before it, never those behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import CommittedCache, Context, KeyValueCache, block_causal, running_positions


class BlockCausalModel(MaskedDiffusionModel):
    """A model whose attention is block-causal.

    Attributes:
        block_length: tokens of a block, the configuration's; `blocks_of` has a sampler's own in its place.
    """

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
        alone = isinstance(cache, CommittedCache) and visible_BL is None and position_ids is None
        if not alone or cache is None or cache.window.start // self.block_length != self._last_block(cache):
            return super().context(input_ids, visible_BL, position_ids, cache)
        positions_BL = running_positions(input_ids, None)
        return Context(self.trunk().rotary(positions_BL), None, input_ids == self.mask_token_id, None, cache)

    def _last_block(self, cache: KeyValueCache) -> int:
        last: int = (cache.window.stop - 1) // self.block_length
        return last

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
