"""From a hub id or folder to a model and its tokenizer, without remote code and without surprises."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from starquant.errors import CheckpointError, ConfigError, expand_home, nearest
from starquant.models.base import MaskedDiffusionModel
from starquant.models.blocks_on_disk import hollow_model
from starquant.models.checkpoint import CONFIG, Checkpoint, inspect, read_json
from starquant.models.families import family_in, recognize
from starquant.models.family import Family
from starquant.models.hub import cache_fault
from starquant.models.tokenizer import load_byte_level_bpe
from starquant.models.validation import DTYPES, validate_finite, validate_parameters

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def resolve_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """Return a local folder for a checkpoint: the folder itself, or the hub snapshot of an id.

    Raises:
        CheckpointError: neither a folder nor a hub id that can be fetched.
    """
    name = str(path_or_id)
    if not name:
        raise CheckpointError("model.path: got an empty path, allowed: a checkpoint folder or a hub id")
    try:
        folder = Path(expand_home(name))
        if folder.is_dir():
            return folder
        is_file = folder.exists()
    except (OSError, ValueError) as error:  # too long, not allowed to look, no home
        raise CheckpointError(f"{name[:200]}: no usable path: {getattr(error, 'strerror', None) or error}") from None
    if is_file:
        raise CheckpointError(f"{name}: is a file; a checkpoint is a folder")
    if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such checkpoint folder (and not a hub id of the form 'owner/name')")
    return _download(name, revision)


def validate_hub(name: str, revision: str | None = None) -> None:
    """Judge whether the hub, or its cache here, has a checkpoint, by its configuration; raises CheckpointError."""
    if not _HUB_ID.fullmatch(name):
        resolve_folder(name, revision)
    _download(name, revision, (CONFIG,))


def _download(name: str, revision: str | None, files: Sequence[str] = _FILES) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:  # no home: Runtime
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no local folder of that name, and the hub could not be used ({type(error).__name__}: {reason}). "
            f"Give a local checkpoint folder with model.path=DIR, or check the id and the network{cache_fault()}"
        ) from None


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a torch dtype, None for None (as stored); raises ConfigError for an unknown one."""
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype: got '{dtype}', allowed: {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def load_model(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, str | int] | None = None,
    revision: str | None = None,
    blocks_on_disk: bool = False,
) -> MaskedDiffusionModel:
    """Load a checkpoint of a known family in the published layout.

    Names and shapes of all parameters are compared with the architecture before any weight is read, so a
    wrong checkpoint fails at once. Weights are read tensor by tensor: never two copies in memory.

    Args:
        path_or_id: local folder, or hub id.
        dtype: of the loaded weights; None keeps the stored one.
        device: where the whole model goes (default: cpu).
        device_map: as in transformers, instead of `device`: "auto" or module name -> device.
        revision: branch, tag or commit of a hub id.
        blocks_on_disk: keep the blocks on disk and read each one while it runs (`models.blocks_on_disk`).

    Returns:
        The model in evaluation mode; `model(input_ids).logits` is [B, L, V].

    Raises:
        CheckpointError: missing folder or file, pickled or truncated weights, another architecture, missing,
            unexpected or misshapen parameters, values that are not finite; the message names them.
        ConfigError: unknown dtype or device, or both `device` and `device_map` given.
    """
    if device is not None and device_map is not None:
        raise ConfigError("give device or device_map, not both")
    torch_dtype = parse_dtype(dtype)
    target = validate_device(device)
    if device_map is not None and find_spec("accelerate") is None:
        raise ConfigError("device_map: needs the package accelerate (pip install 'starquant[gpu]')")
    checkpoint, family = validate_checkpoint(resolve_folder(path_or_id, revision))
    return read_model(checkpoint, family, torch_dtype, target, device_map, blocks_on_disk)


def read_model(
    checkpoint: Checkpoint,
    family: Family,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    device_map: str | dict[str, str | int] | None = None,
    blocks_on_disk: bool = False,
    changed: Path | None = None,
) -> MaskedDiffusionModel:
    """Read the weights of a checkpoint that has been judged (`validate_checkpoint`); otherwise as `load_model`.

    With blocks on disk, `changed` is the folder for those that are changed.

    Raises:
        CheckpointError: values that are not finite, a tied head that differs from the embedding.
        ConfigError: a device map that cannot be used here.
    """
    target = torch.device(device)
    if blocks_on_disk:
        if device_map is not None:
            raise ConfigError("give device_map or blocks_on_disk, not both")
        model = hollow_model(checkpoint, family.model, dtype or _stored_dtype(checkpoint), target, changed)
        _tie_head(model, checkpoint)
        return model
    if device_map is None and target.type != "cpu" and find_spec("accelerate") is not None:
        device_map = {"": str(target)}  # straight to the device, without a copy in host memory
    return _read_with_transformers(checkpoint, family, dtype, target, device_map)


def _read_with_transformers(
    checkpoint: Checkpoint,
    family: Family,
    dtype: torch.dtype | None,
    target: torch.device,
    device_map: str | dict[str, str | int] | None,
) -> MaskedDiffusionModel:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model: MaskedDiffusionModel = family.model.from_validated(
            checkpoint.folder,
            dtype=dtype or _stored_dtype(checkpoint),
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
        )
    except (ValueError, AssertionError, RuntimeError) as error:
        if device_map is None:
            raise
        raise ConfigError(f"device_map: got {device_map!r}, which cannot be used here: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    if device_map is None:
        model = model.to(target)  # type: ignore[arg-type]  # transformers hides what `to` takes
    _tie_head(model, checkpoint)
    validate_finite(model, f"{checkpoint.folder}: ")
    model.eval()
    return model


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype | str:
    """The one dtype all tensors are stored in, whatever config.json says; "auto" if they differ."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    (only, *others) = set(checkpoint.stored.values())
    return "auto" if others else names.get(only, "auto")


def _tie_head(model: MaskedDiffusionModel, checkpoint: Checkpoint) -> None:
    """A tied head that is stored as well must be the embedding; it then shares its memory."""
    trunk = model.trunk()
    if not getattr(model.config, "tie_word_embeddings", False) or trunk.head is None:
        return
    head, embedding = trunk.head.weight, trunk.embedding.weight
    if head is embedding:
        return
    if not torch.equal(head, embedding):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json ties the head to the embedding, but lm_head.weight is stored and differs"
        )
    trunk.head.weight = trunk.embedding.weight


def validate_device(device: str | torch.device | None, where: str = "runtime.device") -> torch.device:
    """Return the device; raises ConfigError, of the key or option `where`, when it is unknown or not available here."""
    try:
        target = torch.device(device if device is not None else "cpu")
        if target.type == "meta":
            raise RuntimeError("a model on it has no weights")
        if target.type != "cpu":
            torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{where}: '{device}' cannot be used here: {reason}") from None
    return target


def validate_checkpoint(folder: Path) -> tuple[Checkpoint, Family]:
    """Judge a checkpoint without reading its weights; raises CheckpointError as `load_model` does."""
    checkpoint = inspect(folder)
    family = recognize(checkpoint)
    validate_parameters(checkpoint, family.model)
    return checkpoint, family


def load_tokenizer(path_or_id: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer as its family does, without running its code.

    A folder whose config.json is of no known family (or that has none) is read by what lies in it.

    Raises:
        CheckpointError: the folder has no tokenizer, a file is malformed, a listed token gets another id, ids go beyond
            the embedding that config.json describes, or its [MASK] is another token.
    """
    folder = resolve_folder(path_or_id, revision)
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    family = family_in(config)
    if family is None:
        return load_byte_level_bpe(folder)
    tokenizer = family.tokenizer(folder)
    _validate_tokens(tokenizer, family, config, folder)
    return tokenizer


def _validate_tokens(tokenizer: PreTrainedTokenizerBase, family: Family, config: dict[str, Any], folder: Path) -> None:
    """Refuse a tokenizer that gives ids without a row of the embedding, or that has another [MASK]."""
    try:
        described: Any = family.config(**{key: value for key, value in config.items() if key != "model_type"})
        rows = int(getattr(described, "rows", described.vocab_size))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError):
        return  # the model says what is wrong with its configuration
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise CheckpointError(
            f"{folder}: its tokenizer gives ids up to {highest}, but the embedding has {rows} rows (config.json); "
            f"allowed: 0 to {rows - 1}"
        )
    mask_id, own = getattr(described, "mask_token_id", None), tokenizer.mask_token_id
    if own is not None and own != mask_id:
        raise CheckpointError(
            f"{folder / CONFIG}: mask_token_id is {mask_id!r}, but the tokenizer's mask token {tokenizer.mask_token!r} "
            f"is {own}; allowed: {own}"
        )
