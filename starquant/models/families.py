"""The model families that are known: one line each."""

from __future__ import annotations

from starquant.errors import CheckpointError
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


def family_of(model: MaskedDiffusionModel) -> Family:
    """Return the family of a model: that of its class, or of the nearest class that it is derived from."""
    families = {family.model: family for family in map(FAMILIES.load, FAMILIES)}
    return next(families[one] for one in type(model).__mro__ if one in families)


def recognize(checkpoint: Checkpoint) -> Family:
    """Return the family that a checkpoint's config.json names; raises CheckpointError for any other architecture."""
    families = [FAMILIES.load(name) for name in FAMILIES]
    families.sort(key=lambda family: family.architectures is None)  # the narrowest first
    for family in families:
        if family.recognizes(checkpoint.config):
            return family
    model_type = checkpoint.config.get("model_type")
    allowed = ", ".join(dict.fromkeys(family.model_type for family in families))
    raise CheckpointError(f"{checkpoint.folder / CONFIG}: model_type is {model_type!r}; allowed: {allowed}")
