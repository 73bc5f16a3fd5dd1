"""Samplers: which tokens are committed at each denoising step. One file a family."""

from starquant.diffusion.samplers.base import DenoisingState, OnStep, Sampler
from starquant.diffusion.samplers.dream import DreamSampler
from starquant.diffusion.samplers.llada import LLaDASampler

__all__ = ["DenoisingState", "DreamSampler", "LLaDASampler", "OnStep", "Sampler"]
