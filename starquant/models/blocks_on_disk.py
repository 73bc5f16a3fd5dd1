"""Blocks that stay on disk: one is in memory while it runs or is changed, so that a model may be larger than memory.

A block of a checkpoint is read from the checkpoint's files, one that was changed from a file of its own. On the CPU
what is read is mapped, not copied.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from starquant.errors import CheckpointError, ConfigError, RecordError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import Checkpoint, read_header
from starquant.models.fused import stored_place
from starquant.models.tensor_file import write_tensors
from starquant.models.validation import make_config, validate_numbers

_SAID = "starquant"  # key of a file's metadata


class StoredBlocks:
    """The parameters of a checkpoint, read from its safetensors files when asked for.

    Args:
        checkpoint: an inspected checkpoint.
        kind: of the model.
        dtype: of the parameters in memory.
        device: where they are computed with.
        changed: folder for blocks that are changed; None where none may be.

    Attributes:
        parts: blocks that were changed, by index.
        describe: what is said of a changed block in its file, called with the block and its name; None for nothing.
            Where it is set, blocks that lie in the folder already are taken from there (`taken_up`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kind: type[MaskedDiffusionModel],
        dtype: torch.dtype,
        device: torch.device,
        changed: Path | None = None,
    ) -> None:
        self.kind = kind
        self.dtype, self.device, self.changed = dtype, device, changed
        self.parts: dict[int, ChangedBlock] = {}
        self.describe: Callable[[nn.Module, str], dict[str, Any]] | None = None
        self._judged: set[str] = set()
        self._file: dict[str, Path] = {name: file for file in checkpoint.files for name in read_header(file)}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return one stored parameter, or some rows of it, its values judged the first time.

        Raises:
            CheckpointError: its file has gone or changed since it was judged; values that `validate_numbers` refuses.
        """
        try:
            with safe_open(self._file[name], "pt") as stored:
                tensor: Tensor = stored.get_tensor(name) if rows is None else stored.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._file[name]}: {name} cannot be read any more ({error})") from None
        exact = any(part in name for part in self.kind._keep_in_fp32_modules_strict or ())
        tensor = tensor.to(device=self.device, dtype=torch.float32 if exact else self.dtype)
        part = name if rows is None else f"{name} from row {rows.start}"
        if part not in self._judged:
            validate_numbers(tensor, f"{self._file[name].parent}: {part}")
            self._judged.add(part)
        return tensor

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module on the meta device its parameters."""
        for name, _ in list(module.named_parameters()):
            stored, rows = stored_place(module, name, self.kind.fused)
            _put(module, name, nn.Parameter(self.read(f"{prefix}.{stored}", rows), requires_grad=False))


def hollow_model(
    checkpoint: Checkpoint,
    kind: type[MaskedDiffusionModel],
    dtype: torch.dtype | str,
    device: torch.device,
    changed: Path | None = None,
) -> MaskedDiffusionModel:
    """Return a model whose embedding, last norm and head are in memory and whose blocks are not.

    It runs as any other: a block's parameters are read before it runs and dropped afterwards. The dtype "auto" is the
    configuration's, as in transformers. Blocks that are changed (`changing`) are written to the folder `changed`.

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
    stored = StoredBlocks(checkpoint, kind, dtype, device, changed)
    names = {module: name for name, module in model.named_modules()}
    trunk = model.trunk()
    stored.fill(trunk.embedding, names[trunk.embedding])
    stored.fill(trunk.norm, names[trunk.norm])
    if trunk.head is not None and f"{names[trunk.head]}.weight" in checkpoint.shapes:
        stored.fill(trunk.head, names[trunk.head])
    elif trunk.head is not None:  # only a tied head may be absent
        trunk.head.weight = trunk.embedding.weight
    for index, block in enumerate(trunk.blocks):
        _run_from_disk(block, functools.partial(stored.fill, prefix=model.block_name(index)))
    model.stored_blocks = stored
    model.eval()
    return model


def resident_block(model: MaskedDiffusionModel, index: int) -> nn.Module:
    """Return a copy of one block as it stands, in memory on the model's device, that shares nothing with the model."""
    block, stored = model.trunk().blocks[index], model.stored_blocks
    twin = copy.deepcopy(block).requires_grad_(False)
    if stored is not None:
        twin._forward_pre_hooks.clear()
        twin._forward_hooks.clear()
        if index in stored.parts:
            stored.parts[index].fill(twin)
        else:
            stored.fill(twin, model.block_name(index))
    return twin.to(model.device).eval()


@contextmanager
def changing(model: MaskedDiffusionModel, index: int) -> Iterator[nn.Module]:
    """Yield a block to be changed for good: the model's own, or a copy in memory that then stands on disk in its place.

    Raises:
        ConfigError: blocks on disk that may not be changed.
        CheckpointError: what was changed cannot be written.
    """
    blocks, stored = model.trunk().blocks, model.stored_blocks
    if stored is None:
        yield blocks[index]
        return
    if stored.changed is None:
        raise ConfigError("blocks_on_disk: these blocks are only read; allowed: a folder for those that are changed")
    twin = resident_block(model, index)
    yield twin
    said = None if stored.describe is None else stored.describe(twin, model.block_name(index))
    part = ChangedBlock.write(twin, _part_path(stored.changed, index), model.device, said)
    twin.to("meta")
    _run_from_disk(twin, part.fill)
    blocks[index] = twin
    stored.parts[index] = part


def taken_up(model: MaskedDiffusionModel, index: int) -> bool:
    """Return whether a block lies changed in its folder since an earlier, interrupted time; it then counts as changed.

    The model's own block stays as it was: what was changed is for who reads `parts`. A file that is not what was
    written is set aside.
    """
    stored = model.stored_blocks
    if stored is None or stored.describe is None or stored.changed is None:
        return False
    path = _part_path(stored.changed, index)
    if not path.exists():
        return False
    from starquant.store.files import set_aside  # and pydantic, which a bare machine lacks

    try:
        _validate_part(path)
    except RecordError as error:
        set_aside(path, str(error), beside=_digest_path(path))
        return False
    stored.parts[index] = ChangedBlock(path, model.device)
    return True


def _part_path(folder: Path, index: int) -> Path:
    return folder / f"block_{index:03d}.safetensors"


def _digest_path(part: Path) -> Path:
    """Return the file beside a part that is to be gone on with: its size and SHA-256."""
    return part.with_suffix(".json")


def _write_digest(part: Path, content: Path) -> None:
    """Put down what will be in a part; raises OSError where that cannot be written."""
    from starquant.store.files import FileEntry, write_atomically

    write_atomically(_digest_path(part), FileEntry.of(content).model_dump_json() + "\n")


def _validate_part(path: Path) -> None:
    """Compare a part with what was written; raises RecordError where it is another, or nothing tells."""
    from starquant.store.files import FileEntry

    try:
        entry = FileEntry.model_validate_json(_digest_path(path).read_bytes())
    except (OSError, ValueError):
        raise RecordError(
            f"{path}: whether it is what was written cannot be told from {_digest_path(path).name}"
        ) from None
    entry.validate_file(path)


class ChangedBlock:
    """A block's parameters and buffers in a file of its own.

    Args:
        path: of the file.
        device: where they are computed with.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device

    @classmethod
    def write(
        cls, block: nn.Module, path: Path, device: torch.device, said: dict[str, Any] | None = None
    ) -> ChangedBlock:
        """Write a block and what is said of it; the file appears whole, behind its digest where something is said.

        Raises:
            CheckpointError: it cannot be written.
        """
        tensors = dict((*block.named_parameters(), *block.named_buffers()))
        unfinished = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(tensors, unfinished, None if said is None else {_SAID: json.dumps(said)})
            if said is not None:
                _write_digest(path, unfinished)
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            raise CheckpointError(f"{path}: cannot be written: {error}") from error
        return cls(path, device)

    def fill(self, block: nn.Module) -> None:
        """Give a block on the meta device its parameters and buffers; raises CheckpointError when the file has gone."""
        with self._opened() as stored:
            for name, _ in list(block.named_parameters()):
                value = stored.get_tensor(name).to(self.device)
                _put(block, name, nn.Parameter(value, requires_grad=False))
            for name, _ in list(block.named_buffers()):
                _put(block, name, stored.get_tensor(name).to(self.device))

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers on the CPU, mapped; raises CheckpointError as `fill`."""
        with self._opened() as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # no mapping

    def said(self) -> dict[str, Any]:
        """Return what was said of the block; raises CheckpointError as `fill`."""
        with self._opened() as stored:
            said: dict[str, Any] = json.loads((stored.metadata() or {}).get(_SAID, "{}"))
            return said

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as stored:
                yield stored
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot be read any more ({error})") from None


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a parameter or buffer be this tensor."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)


def _run_from_disk(block: nn.Module, fill: Callable[[nn.Module], None]) -> None:
    def read_in(module: nn.Module, _: object) -> None:
        fill(module)

    def drop(module: nn.Module, _: object, __: object) -> None:
        module.to("meta")

    block.register_forward_pre_hook(read_in)
    block.register_forward_hook(drop, always_call=True)  # also when the block fails
