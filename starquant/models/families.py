"""The model families that are known: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starquant.errors import CheckpointError, ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import CONFIG, Checkpoint
from starquant.models.family import Family
from starquant.registry import Registry

FAMILIES: Registry[Family] = Registry(
    "model_type",
    {
        "llada": "starquant.models.llada:LLADA",
        "llada_moe": "starquant.models.llada_moe:LLADA_MOE",
        "llada2": "starquant.models.llada2:LLADA2",
        "dream": "starquant.models.dream:DREAM",
        "sdar": "starquant.models.sdar:SDAR",
    },
)


def known_families() -> list[Family]:
    """Return every family, those that share a `model_type` narrowest first."""
    return sorted(map(FAMILIES.load, FAMILIES), key=lambda family: family.architectures is None)


def family_of(model: MaskedDiffusionModel) -> Family:
    """Return the family of a model: that of its class, or of the nearest class that it is derived from.

    Raises:
        ConfigError: a class that no line of `FAMILIES` leads to.
    """
    families = {family.model: family for family in known_families()}
    for kind in type(model).__mro__:
        if kind in families:
            return families[kind]
    raise ConfigError(f"{type(model).__name__} is of no family in models.families; known: {', '.join(FAMILIES)}")


def family_in(config: Mapping[str, Any]) -> Family | None:
    """Return the family that a config.json is of, None for none."""
    return next((family for family in known_families() if family.recognizes(config)), None)


def recognize(checkpoint: Checkpoint) -> Family:
    """Return the family that a checkpoint's config.json names.

    Raises:
        CheckpointError: any other architecture; the weights of another family of the same `model_type`.
    """
    family, path = family_in(checkpoint.config), checkpoint.folder / CONFIG
    if family is None:
        model_type = checkpoint.config.get("model_type")
        allowed = ", ".join(sorted({family.model_type for family in known_families()}))
        raise CheckpointError(f"{path}: model_type is {model_type!r}; allowed: {allowed}")
    for other in known_families():
        name = next((name for name in checkpoint.shapes if other.hallmark and other.hallmark in name), None)
        if name is not None and other is not family and other.model_type == family.model_type:
            raise CheckpointError(
                f"{path}: architectures is {checkpoint.config.get('architectures')!r}, which is a model of the family "
                f"'{family.name}', but the weight files hold {name}; allowed: {', '.join(other.architectures or ())}"
            )
    return family
