"""Method `packed` and packed checkpoints belong together: neither runs with anything else."""

from __future__ import annotations

from starquant.config.bits import bits_of
from starquant.config.run import RunSpec
from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import CONFIG, Checkpoint
from starquant.packed.description import use_integers


def with_bits_of(spec: RunSpec, checkpoint: Checkpoint) -> RunSpec:
    """Return the run with the bits of a packed checkpoint, the same run for one of full precision.

    Raises:
        ConfigError: another method on a packed checkpoint, or `packed` on one of full precision.
        CheckpointError: bits that are none.
    """
    if "quantization_config" not in checkpoint.config:
        if spec.is_packed:
            raise ConfigError(
                f"method: got packed, but {checkpoint.folder} is not packed; allowed: method=none, which scores it as "
                "it is, or a method that quantizes it"
            )
        return spec
    if not spec.is_packed:
        raise ConfigError(
            f"model.path: {checkpoint.folder} is quantized already, got method={spec.method.name}; allowed: "
            "method=packed, which scores it as it is, or the checkpoint at full precision"
        )
    settings = checkpoint.config["quantization_config"]
    bits = bits_of(settings["bits"], f"{checkpoint.folder / CONFIG}: quantization_config.bits")
    return spec.model_copy(update={"bits": bits})


def choose_products(model: MaskedDiffusionModel, spec: RunSpec) -> None:
    """Let a packed model multiply values or integers (`runtime.packed`).

    Raises:
        ConfigError: integers, where no site and its weights have them.
    """
    if spec.runtime.packed == "values":
        use_integers(model, "never")
    elif spec.runtime.packed == "integers" and not use_integers(model, "always"):
        raise ConfigError(
            f"runtime.packed: got integers, but {spec.bits.name} has none on both sides of a product; allowed: values, "
            "auto"
        )
