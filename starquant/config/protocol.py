"""How a model is evaluated on one task: likelihood settings or a sampler. Plain validated data, no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(gt=0.0, le=1.0)]
Scale = Annotated[float, Field(ge=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Spec(BaseModel):
    """Base of every part of a run's description: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class LLaDASamplerSpec(Spec):
    """Settings of `diffusion.LLaDASampler`."""

    name: Literal["llada"]
    steps: Count
    gen_length: Count
    block_length: Count
    temperature: Scale = 0.0
    cfg_scale: Scale = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    @property
    def answer_length(self) -> int:
        """Tokens of an answer."""
        return self.gen_length

    @model_validator(mode="after")
    def _divides(self) -> LLaDASamplerSpec:
        if self.gen_length % self.block_length:
            raise ValueError(f"block_length {self.block_length} must divide gen_length {self.gen_length}")
        if self.steps % (self.gen_length // self.block_length):
            blocks = self.gen_length // self.block_length
            raise ValueError(f"steps {self.steps} must be a multiple of the {blocks} blocks")
        return self


class DreamSamplerSpec(Spec):
    """Settings of `diffusion.DreamSampler`."""

    name: Literal["dream"]
    steps: Count
    max_new_tokens: Count
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


SamplerSpec = Annotated[LLaDASamplerSpec | DreamSamplerSpec, Field(discriminator="name")]


class TaskProtocol(Spec):
    """How a model family is evaluated on one task: likelihood settings or a sampler, and few-shot examples."""

    num_fewshot: Annotated[int, Field(ge=0)] = 0
    mc_num: Count | None = None
    cfg_scale: Scale = 0.0
    sampler: SamplerSpec | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> TaskProtocol:
        if (self.mc_num is None) == (self.sampler is None):
            raise ValueError("give either mc_num (likelihood task) or sampler (generation task)")
        if self.sampler is not None and self.cfg_scale:
            raise ValueError("cfg_scale is of likelihood tasks; a sampler has its own, sampler.cfg_scale")
        return self
