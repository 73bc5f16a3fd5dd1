"""The mask predictor: what samplers and estimators see of a model.

It hides four things: which hidden state predicts a position (Dream's shift), classifier-free guidance, that norm and
LM head are only computed where somebody reads them, and that their logits are never all in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from starquant.diffusion.sampling import joined
from starquant.errors import NonFiniteError

#: Logits computed at once: small enough for a CPU's cache, large enough that a GPU reads the head rarely.
_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


class Cache(Protocol):
    """Keys and values of an earlier pass (`models.context.KeyValueCache`): the next one computes its window only."""

    window: slice


class MaskPredictor:
    """Predict tokens at given positions of partly masked sequences.

    Args:
        model: one whose forward takes (input_ids, attention_mask, cache, project) and which has `project`, `trunk`,
            `logit_offset` (`models.base.MaskedDiffusionModel`).
    """

    #: Whether samplers may have passes read keys and values of earlier ones.
    caches: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model)
        self.mask_id: int = int(self.model.config.mask_token_id)
        self.offset: int = int(self.model.logit_offset)
        self.config: Any = self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def __call__(self, ids_BL: Tensor, positions: tuple[Tensor, Tensor], **settings: Any) -> Tensor:
        """Return float32 logits [N, V], as `chunks` gives them."""
        parts = [logits_NV for _, logits_NV in self.chunks(ids_BL, positions, **settings)]
        return joined(parts)

    @torch.inference_mode()
    def chunks(
        self,
        ids_BL: Tensor,
        positions: tuple[Tensor, Tensor],
        *,
        visible_BL: Tensor | None = None,
        cfg_scale: float = 0.0,
        prompt_BL: Tensor | None = None,
        cache: Cache | None = None,
        position_BL: Tensor | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which of the N positions, their float32 logits [n, V]) for the tokens at (rows [N], columns [N]).

        Args:
            ids_BL: partly masked sequences.
            positions: where to predict.
            visible_BL: False on padding; None when there is none.
            cfg_scale: classifier-free guidance s: l_un + (s + 1)(l - l_un), l_un with the prompt masked; both
                branches run in one batch, none when s = 0.
            prompt_BL: True on prompt tokens; needed for cfg_scale > 0.
            cache: of an earlier pass over these sequences; positions lie in its window.
            position_BL: of every token; None for the running count of those that are no padding.

        Raises:
            ValueError: guidance without a prompt mask.
            NonFiniteError: logits that are not finite, once the next ones are asked for; the message names the first
                block that made them.
        """
        rows, columns = positions
        source = self.source_columns(rows, columns, visible_BL)
        branches = [(rows, source)]
        if cfg_scale != 0.0:
            if prompt_BL is None:
                raise ValueError("classifier-free guidance needs to know which tokens are the prompt")
            branches.append((rows + len(ids_BL), source))
            ids_BL = torch.cat((ids_BL, ids_BL.masked_fill(prompt_BL, self.mask_id)))
            visible_BL = None if visible_BL is None else torch.cat((visible_BL, visible_BL))
            position_BL = None if position_BL is None else torch.cat((position_BL, position_BL))
        hidden_BLD = self._encode(ids_BL, visible_BL, cache, position_BL)
        start = 0 if cache is None else cache.window.start
        size = self.positions_at_once()
        for begin in range(0, max(1, len(rows)), size):
            part = slice(begin, begin + size)
            logits = [self._logits(hidden_BLD[at[part], source[part] - start]) for at, source in branches]
            sums = [logits_NV.sum() for logits_NV in logits]
            if cfg_scale == 0.0:
                yield part, logits[0]
            else:
                conditional, unconditional = logits
                yield part, unconditional + (cfg_scale + 1.0) * (conditional - unconditional)
            # Asked once the caller has given a GPU all that it makes of them: it would stand still meanwhile.
            if not all(math.isfinite(float(total)) for total in sums):
                raise NonFiniteError(self._where_not_finite(ids_BL, visible_BL))

    def positions_at_once(self) -> int:
        """Return how many positions' logits are computed at once: more where each time costs the head's unpacking."""
        trunk = self.model.trunk()
        least: int = getattr(type(trunk.head), "inputs_at_once", 1)
        elements = _ELEMENTS.get(self.device.type, 2**23)
        return max(least, elements // int(trunk.embedding.num_embeddings))

    def _encode(
        self, ids_BL: Tensor, visible_BL: Tensor | None, cache: Cache | None, position_BL: Tensor | None = None
    ) -> Tensor:
        out = self.model(
            input_ids=ids_BL, attention_mask=visible_BL, position_ids=position_BL, cache=cache, project=False
        )
        hidden_BLD: Tensor = out.hidden_states[-1]
        return hidden_BLD

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        logits: Tensor = self.model.project(self.model.trunk().norm(hidden_ND))
        return logits.float()

    def _where_not_finite(self, ids_BL: Tensor, visible_BL: Tensor | None) -> str:
        """Run the pass once more and say which block was the first whose output is not finite."""
        states: list[Tensor] = []
        self.model.run_blocks(ids_BL, visible_BL, states=states)
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        how = f"{dtype}; allowed: model.dtype=bfloat16 or float32, or another quantization"
        for index, hidden_BLD in enumerate(states):
            seen_ND = hidden_BLD if visible_BL is None else hidden_BLD[visible_BL.bool()]
            if bool(seen_ND.isfinite().all()):
                continue
            if index == 0:
                return f"the embedding's values are not finite in {how}"
            before = float(states[index - 1].abs().max())
            return f"{self.model.block_name(index - 1)}: its output is not finite ({before:.3g} went in) in {how}"
        if not bool(self.model.trunk().norm(seen_ND).isfinite().all()):
            return f"the last norm's output is not finite, what goes in is, in {how}"
        return f"the logits are not finite, the output of the last block is, in {how}"

    def source_columns(self, rows: Tensor, columns: Tensor, visible_BL: Tensor | None) -> Tensor:
        """Return the columns [N] whose hidden states predict the tokens at (rows [N], columns [N])."""
        if self.offset == 0:
            return columns
        first = torch.zeros_like(columns) if visible_BL is None else visible_BL.int().argmax(1)[rows]
        return torch.maximum(columns + self.offset, first)  # the first real token reads its own hidden state
