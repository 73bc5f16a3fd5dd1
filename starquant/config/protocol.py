"""How a model is evaluated on one task: likelihood settings or a sampler."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from starquant.config.fields import Rows, Scale, Spec
from starquant.config.samplers import AnySampler


class TaskProtocol(Spec):
    """How a model family is evaluated on one task: likelihood settings or a sampler, and few-shot examples."""

    num_fewshot: Annotated[int, Field(ge=0, le=1000)] = 0
    mc_num: Rows | None = None
    cfg_scale: Scale = 0.0
    sampler: AnySampler | None = None

    @model_validator(mode="after")
    def _validate_kind(self) -> TaskProtocol:
        if (self.mc_num is None) == (self.sampler is None):
            raise ValueError("give either mc_num (likelihood task) or sampler (generation task)")
        if self.sampler is not None and self.cfg_scale:
            raise ValueError("cfg_scale is of likelihood tasks; a sampler has its own, sampler.cfg_scale")
        return self
