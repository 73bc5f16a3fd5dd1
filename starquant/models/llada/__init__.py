"""LLaDA-8B, LLaDA-1.5-8B: `LLADA` is all that is the family's own."""

from starquant.diffusion.noise import LLaDANoise
from starquant.diffusion.samplers import LLaDASampler
from starquant.models.family import Family
from starquant.models.llada.config import LLaDAConfig
from starquant.models.llada.model import LLaDAModelLM

__all__ = ["LLADA", "LLaDAConfig", "LLaDAModelLM"]

LLADA = Family(name="llada", config=LLaDAConfig, model=LLaDAModelLM, noise=LLaDANoise(), sampler=LLaDASampler)
