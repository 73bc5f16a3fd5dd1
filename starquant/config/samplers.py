"""Settings of the samplers, by the name that a protocol gives them (`diffusion.samplers` runs them)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from starquant.config.fields import Count, Ratio, Scale, Spec


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
