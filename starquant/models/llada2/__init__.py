"""LLaDA2.0 and LLaDA2.1, mini and flash: `LLADA2` is all that is the family's own."""

from starquant.diffusion.noise import LLaDANoise
from starquant.diffusion.samplers import LLaDA2Sampler, LLaDA21Sampler
from starquant.models.family import Family
from starquant.models.llada2.config import LLaDA2MoeConfig
from starquant.models.llada2.model import LLaDA2MoeModelLM

__all__ = ["LLADA2", "LLaDA2MoeConfig", "LLaDA2MoeModelLM"]

LLADA2 = Family(
    name="llada2",
    config=LLaDA2MoeConfig,
    model=LLaDA2MoeModelLM,
    noise=LLaDANoise(),  # the report's objective is weighted by time
    sampler=LLaDA2Sampler,
    other_samplers=(LLaDA21Sampler,),
)
