"""Hidden states of all calibration tokens on their way from block to block: in memory, or in files that are mapped.

128 segments of 2,048 tokens are 2.1 GB at LLaDA-8B's width in bfloat16, twice that beside exact ones.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from starquant.errors import DataError
from starquant.models.base import MaskedDiffusionModel


class HeldStates:
    """Where hidden states are held.

    Args:
        folder: where files may be made; None holds them in memory.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files: dict[str, Tensor] = {}
        self._folder: Path | None = None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="hidden-", dir=folder))
            except OSError as error:
                raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error

    @classmethod
    def beside(cls, model: MaskedDiffusionModel) -> HeldStates:
        """Return files beside a model's changed blocks, where it has some and computes on the CPU; else memory."""
        stored = model.stored_blocks
        return cls(None if stored is None or model.device.type != "cpu" else stored.changed)

    def hold(self, name: str, states: Tensor) -> Tensor:
        """Return the states, or their copy in a file of that name, which later states of that name and shape overwrite.

        Raises:
            DataError: the disk is full.
        """
        if self._folder is None:
            return states
        held = self._files.get(name)
        if held is None:
            size = states.numel() * states.element_size()
            if size > shutil.disk_usage(self._folder).free:
                raise DataError(f"{self._folder}: calibration's hidden states need {size} bytes more than the disk has")
            flat = torch.from_file(str(self._folder / name), True, states.numel(), dtype=states.dtype)
            held = self._files[name] = flat.view(states.shape)
        return held.copy_(states)

    def drop(self) -> None:
        """Remove the files."""
        self._files.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
