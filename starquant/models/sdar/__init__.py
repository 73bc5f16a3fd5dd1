"""SDAR-4B, SDAR-8B: `SDAR` is all that is the family's own."""

from starquant.diffusion.noise import DreamNoise
from starquant.diffusion.samplers import SDARSampler
from starquant.models.family import Family
from starquant.models.sdar.config import SDARConfig
from starquant.models.sdar.model import SDARForCausalLM
from starquant.models.tokenizer import load_byte_level_bpe

__all__ = ["SDAR", "SDARConfig", "SDARForCausalLM"]

SDAR = Family(
    name="sdar",
    config=SDARConfig,
    model=SDARForCausalLM,
    noise=DreamNoise(append_eos=False),  # p = (1 - 1e-3) t + 1e-3 in its training as well, weight 1 / p
    sampler=SDARSampler,
    tokenizer=load_byte_level_bpe,
)
