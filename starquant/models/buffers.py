"""Modules whose buffers stay in float32 whatever the model is cast to: scales and transforms are no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module that moves with its model, and whose float32 buffers are not cast with it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {name: b for name, b in self._buffers.items() if b is not None and b.dtype == torch.float32}
        module = super()._apply(fn, recurse)
        for name, buffer in exact.items():
            now = self._buffers[name]
            if now is not None and now.dtype != torch.float32:
                self._buffers[name] = buffer.to(now.device)
        return module
