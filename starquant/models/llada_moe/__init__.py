"""LLaDA-MoE-7B-A1B: `LLADA_MOE` is all that is the family's own."""

from starquant.diffusion.noise import LLaDANoise
from starquant.diffusion.samplers import LLaDASampler
from starquant.models.family import Family
from starquant.models.llada_moe.config import LLaDAMoEConfig
from starquant.models.llada_moe.model import LLaDAMoEModelLM

__all__ = ["LLADA_MOE", "LLaDAMoEConfig", "LLaDAMoEModelLM"]

LLADA_MOE = Family(
    name="llada_moe",
    config=LLaDAMoEConfig,
    model=LLaDAMoEModelLM,
    noise=LLaDANoise(),
    sampler=LLaDASampler,
    architectures=("LLaDAMoEModelLM",),  # dense LLaDA has the same model_type
    hallmark=".mlp.experts.",
)
