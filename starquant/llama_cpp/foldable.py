"""What llama.cpp has no place for: whatever is computed online between the linears."""

from __future__ import annotations

from starquant.config.gguf_bits import ALLOWED_METHODS
from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import InputSite
from starquant.numerics.formats import QuantFormat
from starquant.quantized.activation_quantizer import ActivationQuantizer
from starquant.quantized.attention import QuantizedAttentionCore
from starquant.quantized.fake_quant_linear import FakeQuantLinear


def validate_foldable(model: MaskedDiffusionModel) -> None:
    """Refuse a model that computes anything that a GGUF cannot say.

    Raises:
        ConfigError: an online transform, a gate or a correction, a grid of activations or of attention operands that is
            not llama.cpp's.
        ValueError: weights that are rounded values, not codes.
    """
    if any(isinstance(module, FakeQuantLinear) for module in model.modules()):
        raise ValueError("the model's weights are values; apply the method with packed=True")
    for name, module in model.named_modules():
        if isinstance(module, InputSite) and module.transform is not None:
            raise ConfigError(
                f"export.format: got gguf, which holds no online transform, but {name} has one ({module.transform}); "
                f"allowed: {ALLOWED_METHODS}"
            )
        if isinstance(module, ActivationQuantizer) and (why := _odd_grid(module.format, module.state_clip is not None)):
            raise ConfigError(f"export.format: got gguf, but {name} {why}; allowed: bits=q4_0, bits=q8_0")
        if isinstance(module, QuantizedAttentionCore):
            what = "quantized operands" if any(f.quantizes for f in module.formats.values()) else "an online transform"
            raise ConfigError(f"export.format: got gguf, but {name} has {what}; allowed: {ALLOWED_METHODS}")


def _odd_grid(grid: QuantFormat, clips: bool) -> str | None:
    if grid.block != "q8_0":
        return "rounds on another grid than llama.cpp does"
    return "clips what it rounds, which llama.cpp does not" if clips or grid.clip_ratio < 1.0 else None
