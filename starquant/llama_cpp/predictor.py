"""llama.cpp as a mask predictor: the same samplers, likelihoods and comparisons over another engine's logits.

Every sequence is a pass of its own, without its padding: llama.cpp fills the processor with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from starquant.diffusion.predictor import Cache, MaskPredictor
from starquant.errors import CheckpointError, ConfigError, NonFiniteError
from starquant.llama_cpp.engine import Engine
from starquant.models.base import MaskedDiffusionModel

#: Tokens that llama.cpp takes memory for at most (our choice): LLaDA's whole context, a part of Dream's 131,072.
LONGEST = 4096


def context_of(config: Any) -> int:
    """Return the longest sequence, in tokens, that llama.cpp is given of a model: its context, up to `LONGEST`."""
    return min(int(config.context_length), LONGEST)


class _Configuration:
    """A model's configuration with the engine's context in place of its own."""

    def __init__(self, config: Any, context_length: int) -> None:
        self._config, self.context_length = config, min(int(config.context_length), context_length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class LlamaCppPredictor(MaskPredictor):
    """Predict tokens at given positions, as `MaskPredictor`, from a GGUF.

    Args:
        engine: that has loaded it.
        model: of the checkpoint that the file was made of, for its configuration; may be on the meta device.

    Attributes:
        config: of the model, its context as long as the engine's at most: what prompts are cut and judged by.

    Raises:
        CheckpointError: a file of another architecture or vocabulary than the checkpoint.
    """

    def __init__(self, engine: Engine, model: MaskedDiffusionModel) -> None:
        super().__init__(model)
        self.engine, self.config = engine, _Configuration(model.config, engine.context)
        rows = int(model.trunk().embedding.num_embeddings)
        if engine.vocabulary != rows:
            raise CheckpointError(
                f"{engine.path}: has {engine.vocabulary} tokens, the checkpoint {rows}; allowed: a file made of it"
            )

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device("cpu")

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
        """Yield as `MaskPredictor.chunks`, a sequence at a time.

        Raises:
            ValueError: guidance without a prompt mask.
            ConfigError: a cache, or positions of its own, which llama.cpp's masked-diffusion models have none of.
            NonFiniteError: logits that are not finite.
        """
        if cache is not None:
            raise ConfigError("speed.kv_cache: model.engine=llama_cpp keeps no keys and values; allowed: none")
        if position_BL is not None:
            raise ConfigError("model.engine: llama_cpp counts positions by itself; allowed: torch")
        if cfg_scale != 0.0 and prompt_BL is None:
            raise ValueError("classifier-free guidance needs to know which tokens are the prompt")
        rows, columns = positions
        source = self.source_columns(rows, columns, visible_BL)
        if len(rows) == 0:
            yield slice(0, 0), torch.empty(0, self.engine.vocabulary)
        for row, places in _runs(rows):
            at, shown_L = source[places], None if visible_BL is None else visible_BL[row].bool()
            logits_nV = self._logits_of(ids_BL[row], shown_L, at)
            if cfg_scale != 0.0 and prompt_BL is not None:
                unconditional_nV = self._logits_of(ids_BL[row].masked_fill(prompt_BL[row], self.mask_id), shown_L, at)
                logits_nV = unconditional_nV + (cfg_scale + 1.0) * (logits_nV - unconditional_nV)
            yield places, logits_nV

    def _logits_of(self, ids_L: Tensor, shown_L: Tensor | None, columns_n: Tensor) -> Tensor:
        """Return the logits [n, V] at columns of one sequence."""
        if shown_L is not None:
            columns_n = (shown_L.long().cumsum(0) - 1)[columns_n]
            ids_L = ids_L[shown_L]
        logits_nV = self.engine.logits(ids_L)[columns_n]
        if not bool(logits_nV.sum().isfinite()):
            raise NonFiniteError(f"{self.engine.path}: llama.cpp's logits are not finite")
        return logits_nV

    def _encode(
        self, ids_BL: Tensor, visible_BL: Tensor | None, cache: Cache | None, position_BL: Tensor | None = None
    ) -> Any:
        raise NotImplementedError("llama.cpp gives logits, no hidden states")


def _runs(rows_N: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each run of equal rows, and where it stands."""
    row_list, start = rows_N.tolist(), 0
    for stop in range(1, len(row_list) + 1):
        if stop == len(row_list) or row_list[stop] != row_list[start]:
            yield row_list[start], slice(start, stop)
            start = stop
