"""Blocks that stay on disk: one is in memory while it runs, so that a model larger than memory can be calibrated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from starquant.errors import CheckpointError, ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import Checkpoint, read_header
from starquant.models.validation import make_config


class StoredBlocks:
    """The parameters of a checkpoint, read from its safetensors files when asked for.

    Args:
        checkpoint: an inspected checkpoint.
        dtype: of the parameters in memory.
        device: where they are computed with.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._file: dict[str, Path] = {name: file for file in checkpoint.files for name in read_header(file)}

    def read(self, name: str) -> Tensor:
        """Return one parameter; raises CheckpointError when its file has gone or changed since it was judged."""
        try:
            with safe_open(self._file[name], "pt") as stored:
                tensor: Tensor = stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._file[name]}: {name} cannot be read any more ({error})") from None
        return tensor.to(device=self.device, dtype=self.dtype)

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module on the meta device its parameters."""
        for name, _ in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(self.read(f"{prefix}.{name}"), requires_grad=False)
            setattr(module.get_submodule(owner), leaf, value)


def hollow_model(
    checkpoint: Checkpoint, kind: type[MaskedDiffusionModel], dtype: torch.dtype | str, device: torch.device
) -> MaskedDiffusionModel:
    """Return a model whose embedding, last norm and head are in memory and whose blocks are not.

    It runs as any other: a block's parameters are read before it runs and dropped afterwards. The dtype "auto" is the
    configuration's, as in transformers.

    Raises:
        ConfigError: a packed checkpoint, which stays in memory.
    """
    if "quantization_config" in checkpoint.config:
        raise ConfigError(f"blocks_on_disk: {checkpoint.folder} is packed; allowed: a full-precision checkpoint")
    config = make_config(checkpoint, kind)
    with torch.device("meta"):
        model = kind(config)
    if isinstance(dtype, str):
        dtype = cast("torch.dtype | None", config.dtype) or torch.float32
    stored = StoredBlocks(checkpoint, dtype, device)
    names = {module: name for name, module in model.named_modules()}
    trunk = model.trunk()
    stored.fill(trunk.embedding, names[trunk.embedding])
    stored.fill(trunk.norm, names[trunk.norm])
    if trunk.head is not None and f"{names[trunk.head]}.weight" in checkpoint.shapes:
        stored.fill(trunk.head, names[trunk.head])
    elif trunk.head is not None:  # only a tied head may be absent
        trunk.head.weight = trunk.embedding.weight
    for index, block in enumerate(trunk.blocks):
        _run_from_disk(block, stored, model.block_name(index))
    model.stored_blocks = stored
    model.eval()
    return model


def resident_block(model: MaskedDiffusionModel, index: int) -> nn.Module:
    """Return a copy of one block, in memory on the model's device, that shares nothing with the model."""
    block = model.trunk().blocks[index]
    twin = copy.deepcopy(block).requires_grad_(False)
    if model.stored_blocks is not None:
        twin._forward_pre_hooks.clear()
        twin._forward_hooks.clear()
        model.stored_blocks.fill(twin, model.block_name(index))
    return twin.to(model.device).eval()


def _run_from_disk(block: nn.Module, stored: StoredBlocks, prefix: str) -> None:
    def read_in(module: nn.Module, _: object) -> None:
        stored.fill(module, prefix)

    def drop(module: nn.Module, _: object, __: object) -> None:
        module.to("meta")

    block.register_forward_pre_hook(read_in)
    block.register_forward_hook(drop, always_call=True)  # also when the block fails
