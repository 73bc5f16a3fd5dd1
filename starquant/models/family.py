"""The model families, keyed by the `model_type` of their config.json."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig

from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM


@dataclass(frozen=True)
class Family:
    """A model family: its name in configuration, and its classes."""

    name: str
    config: type[PreTrainedConfig]
    model: type[MaskedDiffusionModel]


FAMILIES: dict[str, Family] = {
    "llada": Family("llada", LLaDAConfig, LLaDAModelLM),
    "Dream": Family("dream", DreamConfig, DreamModel),
}


def register_auto_classes() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoModelForMaskedLM` load every family without remote code."""
    for model_type, family in FAMILIES.items():
        AutoConfig.register(model_type, family.config, exist_ok=True)
        AutoModel.register(family.config, family.model, exist_ok=True)
        AutoModelForMaskedLM.register(family.config, family.model, exist_ok=True)
