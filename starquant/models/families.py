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
        "dream": "starquant.models.dream:DREAM",
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
    """Return the family that a checkpoint's config.json names; raises CheckpointError for any other architecture."""
    family = family_in(checkpoint.config)
    if family is None:
        model_type = checkpoint.config.get("model_type")
        allowed = ", ".join(sorted({family.model_type for family in known_families()}))
        raise CheckpointError(f"{checkpoint.folder / CONFIG}: model_type is {model_type!r}; allowed: {allowed}")
    return family
