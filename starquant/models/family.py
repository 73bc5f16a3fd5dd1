"""A model family: all that is its own, as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from starquant.diffusion.noise import Noise
from starquant.diffusion.samplers import Sampler
from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.tokenizer import load_fast

if TYPE_CHECKING:  # models are used where what describes a run is not installed
    from starquant.config.samplers import SamplerSpec


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: in configuration.
        config: class of its configuration, whose `model_type` stands in config.json.
        model: class of its models: forward pass, roles of linears, attention mask, tied keys.
        noise: mask noise its likelihood is defined over.
        sampler: class of its samplers; `config.samplers` has their settings under the same name.
        other_samplers: further ones that it may be sampled with.
        tokenizer: loads a checkpoint folder's tokenizer.
        prepend_bos: whether its evaluation puts a beginning-of-text token in front of every prompt.
        architectures: of config.json, where other families share the `model_type`; None for any.
        hallmark: part of a parameter's name by which its weights are told from those of such families; None for none.
    """

    name: str
    config: type[PreTrainedConfig]
    model: type[MaskedDiffusionModel]
    noise: Noise
    sampler: type[Sampler]
    tokenizer: Callable[[Path], PreTrainedTokenizerBase] = load_fast
    prepend_bos: bool = False
    architectures: tuple[str, ...] | None = None
    hallmark: str | None = None
    other_samplers: tuple[type[Sampler], ...] = ()

    @property
    def model_type(self) -> str:
        """What config.json calls it."""
        return str(self.config.model_type)

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config.json is of this family."""
        if config.get("model_type") != self.model_type:
            return False
        named = config.get("architectures")
        return self.architectures is None or (isinstance(named, list) and any(n in self.architectures for n in named))

    def make_sampler(self, settings: SamplerSpec, where: str = "model.trajectory") -> Sampler:
        """Return the sampler of validated settings.

        Args:
            settings: from the configuration.
            where: their dotted path, for the error.

        Raises:
            ConfigError: a sampler of another family.
        """
        for sampler in (self.sampler, *self.other_samplers):
            if settings.name == sampler.name:
                return sampler(**settings.model_dump(exclude={"name"}))
        raise ConfigError(f"{where}: sampler '{settings.name}' does not fit a model of the family '{self.name}'")

    def bos_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Return the token that stands in front of every prompt, None for none."""
        return tokenizer.bos_token_id if self.prepend_bos else None
