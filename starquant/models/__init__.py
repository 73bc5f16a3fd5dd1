"""Masked-diffusion models, loaded without remote code: `load_model`, `load_tokenizer`.

A family is one folder that ends in one object (`models.family.Family`), and one line in `models.families`. Importing
this package lets transformers' Auto classes load every `model_type`; families that share one are told apart by
`architectures`, as `load_model` does.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig

from starquant.models.families import FAMILIES, family_in, family_of, known_families
from starquant.models.family import Family
from starquant.models.fused import register_fused
from starquant.models.loading import load_model, load_tokenizer, resolve_folder

__all__ = ["FAMILIES", "Family", "family_of", "load_model", "load_tokenizer", "register", "resolve_folder"]


def register(family: Family) -> None:
    """Let transformers' Auto classes load a family."""
    shared = sum(other.model_type == family.model_type for other in known_families()) > 1
    AutoConfig.register(
        family.model_type, _shared_config(family.model_type) if shared else family.config, exist_ok=True
    )
    AutoModel.register(family.config, family.model, exist_ok=True)
    AutoModelForMaskedLM.register(family.config, family.model, exist_ok=True)
    if family.model.fused:
        register_fused(family.model, family.model.fused)


def _shared_config(shared_type: str) -> type[PreTrainedConfig]:
    """Return what stands for all families of one `model_type`: it reads a config.json as the family that it is of."""

    class SharedConfig(PreTrainedConfig):
        model_type = shared_type

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **more: Any) -> Any:
            family = family_in(config_dict)
            assert family is not None, "one of them takes any architectures"
            return family.config.from_dict(config_dict, **more)

    return SharedConfig


for _family in known_families():
    register(_family)
