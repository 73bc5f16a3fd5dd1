"""Samplers: which tokens are committed at each denoising step. One file a family."""

from starquant.diffusion.samplers.base import DenoisingState, OnStep, Sampler
from starquant.diffusion.samplers.blocks import BlockSampler
from starquant.diffusion.samplers.dream import DreamSampler
from starquant.diffusion.samplers.llada import LLaDASampler
from starquant.diffusion.samplers.llada2 import LLaDA2Sampler, LLaDA21Sampler
from starquant.diffusion.samplers.sdar import SDARSampler

__all__ = [
    "BlockSampler",
    "DenoisingState",
    "DreamSampler",
    "LLaDA2Sampler",
    "LLaDA21Sampler",
    "LLaDASampler",
    "OnStep",
    "SDARSampler",
    "Sampler",
]
