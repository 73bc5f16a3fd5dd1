"""From a hub id or folder to a model and its tokenizer, without remote code and without surprises."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from starquant.errors import CheckpointError, ConfigError, nearest
from starquant.models.base import MaskedDiffusionModel, parameter_shapes
from starquant.models.blocks_on_disk import hollow_model
from starquant.models.checkpoint import Checkpoint, expect_parameters, inspect, read_json
from starquant.models.family import FAMILIES, Family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def resolve_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """Return a local folder for a checkpoint: the folder itself, or the hub snapshot of an id.

    Raises:
        CheckpointError: neither a folder nor a hub id that can be fetched.
    """
    folder = Path(path_or_id).expanduser()
    if not str(path_or_id):
        raise CheckpointError("model.path: got an empty path, allowed: a checkpoint folder or a hub id")
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if folder.exists():
        raise CheckpointError(f"{name}: is a file; a checkpoint is a folder")
    if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such checkpoint folder (and not a hub id of the form 'owner/name')")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no local folder of that name, and the hub could not be used ({type(error).__name__}: {reason}). "
            "Give a local checkpoint folder with model.path=DIR, or check the id and the network"
        ) from None


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family a checkpoint's config.json names; raises CheckpointError for any other architecture."""
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: model_type is {model_type!r}; allowed: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


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
    judged: tuple[Checkpoint, Family] | None = None,
) -> MaskedDiffusionModel:
    """Load a LLaDA or Dream checkpoint in the published layout.

    Names and shapes of all parameters are compared with the architecture before any weight is read, so a
    wrong checkpoint fails at once. Weights are read tensor by tensor: never two copies in memory.

    Args:
        path_or_id: local folder, or hub id.
        dtype: of the loaded weights; None keeps the stored one.
        device: where the whole model goes (default: cpu).
        device_map: as in transformers, instead of `device`: "auto" or module name -> device.
        revision: branch, tag or commit of a hub id.
        blocks_on_disk: keep the blocks on disk and read each one while it runs (`models.blocks_on_disk`).
        judged: what `check_checkpoint` returned for this checkpoint; None judges it here.

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
    target = check_device(device)
    if device_map is not None and find_spec("accelerate") is None:
        raise ConfigError("device_map: needs the package accelerate (pip install 'starquant[gpu]')")
    checkpoint, family = judged or check_checkpoint(resolve_folder(path_or_id, revision))
    if blocks_on_disk:
        if device_map is not None:
            raise ConfigError("give device_map or blocks_on_disk, not both")
        model = hollow_model(checkpoint, family, torch_dtype or _stored_dtype(checkpoint), target)
        _check_tie(model, checkpoint)
        return model
    if device_map is None and target.type != "cpu" and find_spec("accelerate") is not None:
        device_map = {"": str(target)}  # straight to the device, without a copy in host memory
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # Not the family's own, which would judge the checkpoint again.
        model = super(MaskedDiffusionModel, family.model).from_pretrained(
            checkpoint.folder,
            dtype=torch_dtype or _stored_dtype(checkpoint),
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
        model = model.to(target)
    _check_tie(model, checkpoint)
    check_finite(model, f"{checkpoint.folder}: ")
    return model.eval()


def check_finite(model: MaskedDiffusionModel, where: str = "") -> None:
    """Raise CheckpointError for the first tensor that holds values that are not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{where}{name} holds values that are not finite")


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype | str:
    """The one dtype all tensors are stored in, whatever config.json says; "auto" if they differ."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    (only, *others) = set(checkpoint.stored.values())
    return "auto" if others else names.get(only, "auto")


def _check_tie(model: MaskedDiffusionModel, checkpoint: Checkpoint) -> None:
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


def check_device(device: str | torch.device | None) -> torch.device:
    """Return the device; raises ConfigError when it is unknown or not available here."""
    try:
        target = torch.device(device if device is not None else "cpu")
        if target.type == "meta":
            raise RuntimeError("a model on it has no weights")
        if target.type != "cpu":
            torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"runtime.device: '{device}' cannot be used here: {reason}") from None
    return target


def check_checkpoint(folder: Path) -> tuple[Checkpoint, Family]:
    """Judge a checkpoint without reading its weights; raises CheckpointError as `load_model` does."""
    checkpoint = inspect(folder)
    family = family_of(checkpoint)
    _check_parameters(checkpoint, family)
    return checkpoint, family


def make_config(checkpoint: Checkpoint, family: Family) -> PreTrainedConfig:
    """Return the configuration of a checkpoint; raises ValueError for a dtype that weights cannot have."""
    for key in ("dtype", "torch_dtype"):
        found = checkpoint.config.get(key)
        if found is not None and str(found) not in DTYPES:
            raise ValueError(f"{key}: got {found!r}, allowed: {', '.join(DTYPES)}")
    return family.config(**{key: value for key, value in checkpoint.config.items() if key != "model_type"})


def prepare_packed(skeleton: MaskedDiffusionModel, checkpoint: Checkpoint) -> None:
    """Give a model on the meta device the modules of a packed checkpoint; nothing where it is none.

    Raises:
        CheckpointError: another quantization method, a newer version, modules that do not fit the model.
    """
    found = checkpoint.config.get("quantization_config")
    if found is None:
        return
    path = checkpoint.folder / "config.json"
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method != "starquant":
        raise CheckpointError(f"{path}: quantization_config.quant_method is {method!r}; allowed: starquant")
    try:
        AutoHfQuantizer.from_config(dict(found), pre_quantized=True).preprocess_model(skeleton)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_parameters(checkpoint: Checkpoint, family: Family) -> None:
    config_path = checkpoint.folder / "config.json"
    try:
        config = make_config(checkpoint, family)
        with torch.device("meta"):
            skeleton = family.model(config)
        prepare_packed(skeleton, checkpoint)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{config_path}: not a usable configuration: {error}") from None
    rows, mask_id = skeleton.trunk().embedding.num_embeddings, config.mask_token_id
    if not isinstance(mask_id, int) or not 0 <= mask_id < rows:
        raise CheckpointError(f"{config_path}: mask_token_id is {mask_id!r}; allowed: 0 to {rows - 1}")
    tied = frozenset({"lm_head.weight"}) if getattr(config, "tie_word_embeddings", False) else frozenset()
    kinds = {name: "U8" if b.dtype == torch.uint8 else "F32" for name, b in skeleton.named_buffers()}  # packed
    expect_parameters(checkpoint, parameter_shapes(skeleton), tied, kinds)


def load_tokenizer(path_or_id: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of either family without running its code.

    LLaDA ships a `tokenizer.json`. Dream ships a Python class over Qwen2's byte-level BPE (`vocab.json`,
    `merges.txt`): the same BPE is built here, with the special tokens its config lists.

    Raises:
        CheckpointError: the folder has neither, a file is malformed, or a listed token gets another id.
    """
    folder = resolve_folder(path_or_id, revision)
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    has_bpe = (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    is_bpe = config.get("tokenizer_class") in ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast", None)
    if has_bpe and is_bpe:
        tokenizer = _from_folder(Qwen2Tokenizer, folder)
    elif (folder / "tokenizer.json").exists():
        tokenizer = _from_folder(PreTrainedTokenizerFast, folder)
    else:
        raise CheckpointError(f"{folder}: no tokenizer: neither tokenizer.json nor vocab.json with merges.txt is there")
    _check_listed_ids(folder, config, tokenizer)
    return tokenizer


def _from_folder(kind: type[PreTrainedTokenizerBase], folder: Path) -> PreTrainedTokenizerBase:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would remark that the class name differs
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on malformed files
        raise CheckpointError(f"{folder}: its tokenizer files cannot be read: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_listed_ids(folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    listed = config.get("added_tokens_decoder")
    for number, token in (listed if isinstance(listed, dict) else {}).items():
        got = tokenizer.convert_tokens_to_ids(token["content"])
        if got != int(number):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: token '{token['content']}' is listed with id {number}, gets {got}"
            )
