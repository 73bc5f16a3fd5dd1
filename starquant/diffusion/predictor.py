"""The mask predictor: what samplers and estimators see of a model.

It hides three things: which hidden state predicts a position (Dream's shift), classifier-free guidance, and
that the LM head is only computed where somebody reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MaskPredictor:
    """Predict tokens at given positions of partly masked sequences.

    Args:
        model: a model whose forward takes (input_ids, attention_mask, logit_positions), with `mask_token_id`
            and `logit_offset`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.mask_id: int = int(model.config.mask_token_id)  # type: ignore[union-attr, arg-type]
        self.offset: int = int(getattr(model, "logit_offset", 0))
        self.config: Any = model.config

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def __call__(
        self,
        ids_BL: Tensor,
        positions: tuple[Tensor, Tensor],
        *,
        visible_BL: Tensor | None = None,
        cfg_scale: float = 0.0,
        prompt_BL: Tensor | None = None,
    ) -> Tensor:
        """Return float32 logits [N, V] for the tokens at `positions` (rows [N], columns [N]).

        Args:
            ids_BL: partly masked sequences.
            positions: where to predict.
            visible_BL: False on padding; None when there is none.
            cfg_scale: classifier-free guidance s: l_un + (s + 1)(l - l_un), l_un with the prompt masked; both
                branches run in one batch, none when s = 0.
            prompt_BL: True on prompt tokens; needed for cfg_scale > 0.

        Raises:
            ValueError: guidance without a prompt mask.
        """
        rows, columns = positions
        source = self._source_columns(rows, columns, visible_BL)
        if cfg_scale == 0.0:
            return self._logits(ids_BL, visible_BL, (rows, source))
        if prompt_BL is None:
            raise ValueError("classifier-free guidance needs to know which tokens are the prompt")
        both = torch.cat((ids_BL, ids_BL.masked_fill(prompt_BL, self.mask_id)))
        visible = None if visible_BL is None else torch.cat((visible_BL, visible_BL))
        logits = self._logits(both, visible, (torch.cat((rows, rows + len(ids_BL))), source.repeat(2)))
        conditional, unconditional = logits.chunk(2)
        return unconditional + (cfg_scale + 1.0) * (conditional - unconditional)

    def _logits(self, ids_BL: Tensor, visible_BL: Tensor | None, positions: tuple[Tensor, Tensor]) -> Tensor:
        out = self.model(input_ids=ids_BL, attention_mask=visible_BL, logit_positions=positions)
        logits: Tensor = out.logits
        return logits.float()

    def _source_columns(self, rows: Tensor, columns: Tensor, visible_BL: Tensor | None) -> Tensor:
        if self.offset == 0:
            return columns
        first = torch.zeros_like(columns) if visible_BL is None else visible_BL.int().argmax(1)[rows]
        return torch.maximum(columns + self.offset, first)  # the first real token reads its own hidden state
