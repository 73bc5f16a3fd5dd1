"""Options of STaR-Quant's transforms that do not go together."""

from __future__ import annotations

from starquant.config.methods.star_quant import STaRQuantOptions
from starquant.errors import ConfigError


def validate_transforms(options: STaRQuantOptions) -> None:
    """Judge what of the transform's options does not go together; raises ConfigError."""
    transform = options.transform
    norm_sites = ("qkv_input", "gate_up_input")
    for name, shares in (("masked", options.sgat.masked), ("unmasked", options.sgat.unmasked)):
        behind_norms = [getattr(shares, site) for site in norm_sites]
        if transform.structure == "shared" and options.sgat.enabled and behind_norms[0] != behind_norms[1]:
            raise ConfigError(
                f"method.sgat.{name}: got {behind_norms[0]} at qkv_input and {behind_norms[1]} at gate_up_input, "
                "which share a transform (method.transform.structure=shared); allowed: one share for both"
            )
    learns = transform.fit == "learned" and transform.structure != "shared"
    if transform.balance and not (learns and transform.start == "rotation"):
        raise ConfigError(
            f"method.transform.balance: got true, but method.transform.fit is '{transform.fit}', start "
            f"'{transform.start}', structure '{transform.structure}'; allowed: true with learned, rotation and another "
            "structure than shared"
        )
    if transform.channel_scales and (options.residual_rotation != "none" or transform.fit == "fixed"):
        raise ConfigError(
            f"method.transform.channel_scales: got true, but method.residual_rotation is '{options.residual_rotation}' "
            f"and method.transform.fit '{transform.fit}'; allowed: true with none and learned or closed_form"
        )
    if transform.sites == "residual" and transform.fit != "fixed" and transform.structure != "shared":
        raise ConfigError(
            f"method.transform.sites: got residual, but structure is '{transform.structure}'; allowed: shared"
        )
    fisher = options.fisher
    if (fisher.outputs or fisher.rows) and not learns:
        name = "outputs" if fisher.outputs else "rows"
        raise ConfigError(
            f"method.fisher.{name}: got true, but no site learns a transform of its own (method.transform.fit="
            f"{transform.fit}, structure={transform.structure}); allowed: false"
        )
    if fisher.hessian and options.weights.name != "gptq":
        raise ConfigError(
            f"method.fisher.hessian: got true, but method.weights.name={options.weights.name} reads no second moments; "
            "allowed: false"
        )
    if transform.structure == "shared" and options.residual_rotation == "none" and transform.fit != "fixed":
        raise ConfigError(
            "method.residual_rotation: got 'none', but method.transform.structure=shared learns the residual rotation; "
            "allowed: hadamard, orthogonal"
        )
