"""Settings of the samplers, by the name that a protocol gives them; `diffusion.samplers` runs them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from starquant.config.fields import Count, Ratio, Scale, Share, Spec, Steps, Tokens
from starquant.errors import nearest
from starquant.registry import Registry

TokenId = Annotated[int, Field(ge=0, le=2**24)]


class SamplerSpec(Spec, ABC):
    """Base of the settings of a sampler."""

    name: str

    @property
    @abstractmethod
    def answer_length(self) -> int:
        """Tokens of an answer."""

    @property
    def commits_by_chance(self) -> str | None:
        """The setting by which chance decides which tokens are committed, None for none."""
        return None


class LLaDASamplerSpec(SamplerSpec):
    """Settings of `diffusion.LLaDASampler`."""

    name: Literal["llada"]
    steps: Steps
    gen_length: Tokens
    block_length: Tokens
    temperature: Scale = 0.0
    cfg_scale: Scale = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    @property
    def answer_length(self) -> int:
        """Tokens of an answer."""
        return self.gen_length

    @property
    def commits_by_chance(self) -> str | None:
        """Random remasking."""
        return "remasking" if self.remasking == "random" else None

    @model_validator(mode="after")
    def _validate_blocks(self) -> LLaDASamplerSpec:
        if self.gen_length % self.block_length:
            raise ValueError(f"block_length {self.block_length} must divide gen_length {self.gen_length}")
        if self.steps % (self.gen_length // self.block_length):
            blocks = self.gen_length // self.block_length
            raise ValueError(f"steps {self.steps} must be a multiple of the {blocks} blocks")
        return self


class DreamSamplerSpec(SamplerSpec):
    """Settings of `diffusion.DreamSampler`."""

    name: Literal["dream"]
    steps: Steps
    max_new_tokens: Tokens
    alg: Literal["entropy", "maskgit_plus", "origin", "topk_margin"] = "entropy"
    eps: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-3
    temperature: Scale = 0.0
    top_p: Ratio | None = None
    top_k: Count | None = 50
    alg_temp: Scale | None = None

    @property
    def answer_length(self) -> int:
        """Tokens of an answer."""
        return self.max_new_tokens

    @property
    def commits_by_chance(self) -> str | None:
        """Positions drawn evenly, or by a temperature."""
        return "alg" if self.alg == "origin" else "alg_temp" if self.alg_temp else None


class BlockSamplerSpec(SamplerSpec):
    """What the settings of block diffusion share; the cache changes no token."""

    gen_length: Tokens
    block_length: Tokens
    temperature: Scale = 0.0
    cache: bool = True

    @property
    def answer_length(self) -> int:
        """Tokens of an answer."""
        return self.gen_length


class SDARSamplerSpec(BlockSamplerSpec):
    """Settings of `diffusion.SDARSampler`."""

    name: Literal["sdar"]
    steps_per_block: Steps = 4
    remasking: Literal["sequential", "low_confidence_static", "low_confidence_dynamic"] = "low_confidence_static"
    threshold: Ratio = 0.95
    stop_ids: tuple[TokenId, ...] | None = None


class LLaDA2SamplerSpec(BlockSamplerSpec):
    """Settings of `diffusion.LLaDA2Sampler`."""

    name: Literal["llada2"]
    steps_per_block: Steps = 32
    threshold: Ratio = 0.95
    minimal_topk: Count = 1
    eos_early_stop: bool = False
    eos_id: TokenId | None = None


class LLaDA21SamplerSpec(BlockSamplerSpec):
    """Settings of `diffusion.LLaDA21Sampler`."""

    name: Literal["llada2_1"]
    threshold: Ratio = 0.95
    editing_threshold: Share = 0.9
    max_post_steps: Annotated[int, Field(ge=0, le=100_000)] = 16
    num_to_transfer: Count = 1
    eos_early_stop: bool = False
    eos_id: TokenId | None = None


SAMPLERS: Registry[type[SamplerSpec]] = Registry(
    "sampler.name",
    {
        "llada": "starquant.config.samplers:LLaDASamplerSpec",
        "dream": "starquant.config.samplers:DreamSamplerSpec",
        "llada2": "starquant.config.samplers:LLaDA2SamplerSpec",
        "llada2_1": "starquant.config.samplers:LLaDA21SamplerSpec",
        "sdar": "starquant.config.samplers:SDARSamplerSpec",
    },
)


def _validate_by_name(settings: Any) -> SamplerSpec:
    """Validate settings by the sampler that they name."""
    if isinstance(settings, SamplerSpec):
        return settings
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise ValueError(f"name: missing; allowed: {', '.join(SAMPLERS)}")
    name = settings["name"]
    if name not in SAMPLERS:
        raise ValueError(f"name: got '{name}', allowed: {', '.join(SAMPLERS)}.{nearest(name, SAMPLERS)}")
    return SAMPLERS.load(name).model_validate_json(json.dumps(dict(settings)))


#: Settings of any sampler, validated by their name.
AnySampler = Annotated[SerializeAsAny[SamplerSpec], BeforeValidator(_validate_by_name)]
