"""Native LLaDA and Dream: `load_model`, `load_tokenizer`, and registration with transformers' Auto classes.

A family is one file with a config and a model class, plus one line in `FAMILIES`.
"""

from starquant.models.family import FAMILIES, register_auto_classes
from starquant.models.loading import load_model, load_tokenizer, resolve_folder

register_auto_classes()

__all__ = ["FAMILIES", "load_model", "load_tokenizer", "resolve_folder"]
