"""A checkpoint judged by the architecture it says it is of, before any weight is read."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from starquant.errors import CheckpointError
from starquant.models.checkpoint import CONFIG, FLOATS, Checkpoint, validate_shapes
from starquant.models.config_values import is_whole, validate_values
from starquant.models.fused import fuse_shapes
from starquant.numerics.chunks import row_slices
from starquant.registry import Registry

#: Magnitude beyond which no weight, scale or transform is one: a damaged file, or another dtype's bytes. Our choice.
LARGEST = 1e6

#: What a configuration raises that makes no model, transformers' own judgement among them.
_UNUSABLE = (
    *(ValueError, TypeError, ZeroDivisionError, RuntimeError, AttributeError, LookupError, OverflowError),
    StrictDataclassError,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Packed formats, by `quant_method`: the classes transformers knows once their modules are imported.
QUANTIZATIONS: Registry[type] = Registry(
    "quantization_config.quant_method", {"starquant": "starquant.packed.plugin:PackedConfig"}
)


def make_config(checkpoint: Checkpoint, kind: type[PreTrainedModel]) -> PreTrainedConfig:
    """Return a model's configuration as a checkpoint has it.

    Raises:
        ValueError: numbers that are none or out of range, a dtype that weights cannot have.
    """
    validate_values(checkpoint.config)
    for key in ("dtype", "torch_dtype"):
        dtype = checkpoint.config.get(key)
        if dtype is not None and str(dtype) not in DTYPES:
            raise ValueError(f"{key}: got {dtype!r}, allowed: {', '.join(DTYPES)}")
    assert kind.config_class is not None
    return kind.config_class(**{key: value for key, value in checkpoint.config.items() if key != "model_type"})


def skeleton_of(checkpoint: Checkpoint, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """Return the model on the meta device, as a checkpoint's config.json implies it.

    Raises:
        CheckpointError: a configuration that is not usable, or of a quantization that is not known.
    """
    try:
        config = make_config(checkpoint, kind)
        _validate_depth(config, checkpoint)
        with torch.device("meta"):
            skeleton = kind(config)
        _prepare_packed(skeleton, checkpoint)
    except _UNUSABLE as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.folder / CONFIG}: not a usable configuration: {why}") from None
    return skeleton


def _validate_depth(config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse more blocks than there are tensors, before any is made; raises ValueError."""
    blocks: Any = getattr(config, "num_hidden_layers", 1)
    if checkpoint.shapes and blocks > len(checkpoint.shapes):
        raise ValueError(f"it has {blocks} blocks, the weight files hold {len(checkpoint.shapes)} tensors")


def validate_parameters(checkpoint: Checkpoint, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """Compare names, shapes and dtypes of a checkpoint with the architecture; returns the model on the meta device.

    Raises:
        CheckpointError: missing, unexpected, misshapen or mistyped parameters, special ids without a row; as
            `skeleton_of`.
    """
    skeleton = skeleton_of(checkpoint, kind)
    _validate_ids(skeleton, checkpoint)
    tied = getattr(skeleton.config, "tie_word_embeddings", False)
    optional = frozenset(kind._tied_weights_keys or ()) if tied else frozenset[str]()
    kinds = {name: FLOATS for name, _ in skeleton.named_parameters()}
    kinds |= {name: ("U8",) if b.dtype == torch.uint8 else ("F32",) for name, b in skeleton.named_buffers()}  # packed
    shapes = parameter_shapes(skeleton)
    if "quantization_config" not in checkpoint.config:
        shapes = fuse_shapes(shapes, getattr(kind, "fused", {}))
    validate_shapes(checkpoint, shapes, optional, kinds)
    return skeleton


def _validate_ids(skeleton: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Judge the ids that are read: each must have a row of the embedding; only [MASK] must be there."""
    embedding = cast(nn.Embedding, skeleton.get_input_embeddings())
    rows, path = embedding.num_embeddings, checkpoint.folder / CONFIG
    for key in ("mask_token_id", "eos_token_id", "eot_token_id"):
        value: Any = getattr(skeleton.config, key, None)
        ids: list[Any] = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if value is None and key != "mask_token_id":
            continue
        if not all(is_whole(number) and 0 <= number < rows for number in ids):
            raise CheckpointError(f"{path}: {key} is {value!r}; allowed: 0 to {rows - 1}")
        if key != "mask_token_id" and skeleton.config.mask_token_id in ids:
            raise CheckpointError(f"{path}: mask_token_id and {key} are both {value!r}; allowed: two tokens")


def validate_finite(model: nn.Module, where: str = "") -> None:
    """Raise CheckpointError for the first tensor that holds values that are not finite, or of no weight's size."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        validate_numbers(tensor, f"{where}{name}")


def validate_numbers(tensor: torch.Tensor, name: str) -> None:
    """Judge the values of one tensor; whole numbers pass.

    Raises:
        CheckpointError: values that are not finite or beyond `LARGEST`, a matrix of zeros.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    numbers = tensor.detach().flatten()
    bounds = [bound.item() for part in row_slices(numbers) for bound in numbers[part].aminmax()]
    largest = math.nan if any(map(math.isnan, bounds)) else max(map(abs, bounds))
    if not math.isfinite(largest):
        raise CheckpointError(f"{name} holds values that are not finite")
    if largest > LARGEST:
        raise CheckpointError(f"{name} holds values of up to {largest:.3g}; allowed: at most {LARGEST:g}")
    if largest == 0.0 and tensor.dim() > 1:
        raise CheckpointError(f"{name} holds zeros only")


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return every parameter's name and shape, in the checkpoint's naming."""
    return {name: tuple(p.shape) for name, p in model.state_dict().items() if isinstance(p, torch.Tensor)}


def load_quantizations() -> None:
    """Let transformers know every packed format."""
    for method in QUANTIZATIONS:
        QUANTIZATIONS.load(method)


def _prepare_packed(skeleton: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Give a model on the meta device the modules of a packed checkpoint; nothing where it is none.

    Raises:
        CheckpointError: another quantization method, a newer version, modules that do not fit the model.
    """
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        return
    path = checkpoint.folder / CONFIG
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in QUANTIZATIONS:
        allowed = ", ".join(QUANTIZATIONS)
        raise CheckpointError(f"{path}: quantization_config.quant_method is {method!r}; allowed: {allowed}")
    QUANTIZATIONS.load(method)  # its import registers it
    try:
        AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).preprocess_model(skeleton)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
