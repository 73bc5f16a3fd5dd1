"""A checkpoint judged by the architecture it says it is of, before any weight is read."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from starquant.errors import CheckpointError
from starquant.models.checkpoint import CONFIG, Checkpoint, validate_shapes
from starquant.numerics.chunks import row_slices
from starquant.registry import Registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Packed formats, by `quant_method`: the classes transformers knows once their modules are imported.
QUANTIZATIONS: Registry[type] = Registry(
    "quantization_config.quant_method", {"starquant": "starquant.packed.plugin:PackedConfig"}
)


def make_config(checkpoint: Checkpoint, kind: type[PreTrainedModel]) -> PreTrainedConfig:
    """Return a model's configuration as a checkpoint has it; raises ValueError for a dtype that weights cannot have."""
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
        with torch.device("meta"):
            skeleton = kind(make_config(checkpoint, kind))
        _prepare_packed(skeleton, checkpoint)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.folder / CONFIG}: not a usable configuration: {error}") from None
    return skeleton


def validate_parameters(checkpoint: Checkpoint, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """Compare names, shapes and dtypes of a checkpoint with the architecture; returns the model on the meta device.

    Raises:
        CheckpointError: missing, unexpected or misshapen parameters, a mask id without a row; as `skeleton_of`.
    """
    skeleton = skeleton_of(checkpoint, kind)
    embedding = cast(nn.Embedding, skeleton.get_input_embeddings())
    rows, mask_id = embedding.num_embeddings, skeleton.config.mask_token_id
    if not isinstance(mask_id, int) or not 0 <= mask_id < rows:
        raise CheckpointError(f"{checkpoint.folder / CONFIG}: mask_token_id is {mask_id!r}; allowed: 0 to {rows - 1}")
    tied = getattr(skeleton.config, "tie_word_embeddings", False)
    optional = frozenset(kind._tied_weights_keys or ()) if tied else frozenset[str]()
    kinds = {name: "U8" if b.dtype == torch.uint8 else "F32" for name, b in skeleton.named_buffers()}  # packed
    validate_shapes(checkpoint, parameter_shapes(skeleton), optional, kinds)
    return skeleton


def validate_finite(model: nn.Module, where: str = "") -> None:
    """Raise CheckpointError for the first tensor that holds values that are not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        numbers = tensor.flatten()
        parts = row_slices(numbers) if tensor.is_floating_point() else ()
        if not all(bool(numbers[part].isfinite().all()) for part in parts):
            raise CheckpointError(f"{where}{name} holds values that are not finite")


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
