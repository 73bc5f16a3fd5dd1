"""What transformers must know to load packed checkpoints; importing this module tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from starquant.errors import CheckpointError
from starquant.kernels.dispatch import validate_tensor_cores
from starquant.models.loading import validate_checkpoint
from starquant.models.validation import validate_finite
from starquant.packed.completeness import validate_complete
from starquant.packed.description import rebuild, use_integers
from starquant.packed.speed import note_speed
from starquant.quantized.activation_quantizer import ActivationQuantizer
from starquant.quantized.attention import QuantizedAttentionCore
from starquant.quantized.packed_linear import Packed
from starquant.quantized.state_transforms import BlockAffine, StateGate
from starquant.quantized.transforms import KeyTransform, KroneckerTransform, OrthogonalTransform

#: Version 2: the rows of a gate are masked tokens, then all others; its widths d_m and d_u.
METHOD, VERSION = "starquant", 2


#: Modules whose tensors must be more than finite.
_JUDGED = (
    *(Packed, ActivationQuantizer, QuantizedAttentionCore),
    *(OrthogonalTransform, KroneckerTransform, KeyTransform, BlockAffine, StateGate),
)


class PackedConfig(QuantizationConfigMixin):
    """What `quantization_config` holds.

    Attributes:
        version: of the format.
        bits: of weights, activations, attention, embedding and head.
        modules: what stands at each place (`packed.description`).
        made_by: method, record, model and seed that it came from; loading reads nothing of it.

    Raises:
        CheckpointError: another version, or keys missing.
    """

    def __init__(self, **fields: Any) -> None:
        version = fields.get("version")
        if type(version) is not int or version != VERSION:  # true and 1.0 equal 1
            newer = isinstance(version, int) and version > VERSION
            why = "; a later starquant wrote it" if newer else ""
            raise CheckpointError(f"quantization_config.version: got {version!r}, this version reads {VERSION}{why}")
        for key in ("bits", "modules"):
            if key not in fields:
                raise CheckpointError(f"quantization_config.{key}: missing")
            if not isinstance(fields[key], dict):
                raise CheckpointError(f"quantization_config.{key}: got {str(fields[key])[:40]!r}, allowed: an object")
        if unknown := sorted(set(fields) - {"quant_method", "version", "bits", "modules", "made_by"}):
            raise CheckpointError(f"quantization_config: unknown: {', '.join(unknown)[:200]}")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers has an enum of its own methods
        self.version, self.bits, self.modules = version, fields["bits"], fields["modules"]
        self.made_by = fields.get("made_by", {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **more: Any) -> Any:
        """Return the configuration, as transformers asks for it."""
        config = cls(**config_dict)
        return (config, more) if return_unused_kwargs else config


class PackedQuantizer(HfQuantizer):
    """Puts packed linears, transforms and quantizers in place before the weights are read."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = kwargs.get("checkpoint_files")
        if files:  # transformers would fill what is missing with noise
            validate_checkpoint(Path(files[0]).parent)
        config = cast(PackedConfig, self.quantization_config)
        validate_complete(model, config.modules, config.bits)
        with torch.device("meta"):
            rebuild(model, config.modules)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, _JUDGED):
                module.validate(name)
        validate_finite(model)
        validate_tensor_cores(model.device)
        use_integers(model, "on_gpu")
        note_speed(cast(PackedConfig, self.quantization_config).bits, model.device)
        return model

    def is_serializable(self) -> bool:
        """Say that `starquant.packed.export` is how such a model is saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


register_quantization_config(METHOD)(PackedConfig)
register_quantizer(METHOD)(PackedQuantizer)
