"""Masked-diffusion models, loaded without remote code: `load_model`, `load_tokenizer`.

A family is one folder that ends in one object (`models.family.Family`), and one line in `models.families`. Importing
this package lets transformers' Auto classes load every `model_type`; where families share one, `load_model` tells them
apart, and the Auto classes know the one without `architectures`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from starquant.models.families import FAMILIES, family_of, known_families
from starquant.models.family import Family
from starquant.models.loading import load_model, load_tokenizer, resolve_folder

__all__ = ["FAMILIES", "Family", "family_of", "load_model", "load_tokenizer", "register", "resolve_folder"]


def register(family: Family) -> None:
    """Let transformers' Auto classes load a family."""
    AutoConfig.register(family.model_type, family.config, exist_ok=True)
    AutoModel.register(family.config, family.model, exist_ok=True)
    AutoModelForMaskedLM.register(family.config, family.model, exist_ok=True)


for _family in known_families():
    register(_family)
