"""Masked diffusion: forward masking, likelihood estimation, samplers.

Shape suffixes: B batch, L sequence, P prompt, G answer (generated) length, V vocabulary, N selected positions,
R mask patterns of one request, T target tokens.
"""

from starquant.diffusion.batch_size import BatchSize
from starquant.diffusion.cached_generation import generate_approximately
from starquant.diffusion.continuous_batching import generate_many
from starquant.diffusion.generation import generate
from starquant.diffusion.likelihood import LikelihoodEstimator, ScoreRequest
from starquant.diffusion.masking import forward_mask
from starquant.diffusion.noise import DreamNoise, LLaDANoise, MaskPatterns
from starquant.diffusion.predictor import MaskPredictor
from starquant.diffusion.samplers import DreamSampler, LLaDA2Sampler, LLaDA21Sampler, LLaDASampler, Sampler, SDARSampler

__all__ = [
    "BatchSize",
    "DreamNoise",
    "DreamSampler",
    "LLaDA2Sampler",
    "LLaDA21Sampler",
    "LLaDANoise",
    "LLaDASampler",
    "LikelihoodEstimator",
    "MaskPatterns",
    "MaskPredictor",
    "SDARSampler",
    "Sampler",
    "ScoreRequest",
    "forward_mask",
    "generate",
    "generate_approximately",
    "generate_many",
]
