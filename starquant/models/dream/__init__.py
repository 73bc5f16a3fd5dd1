"""Dream-7B: `DREAM` is all that is the family's own."""

from starquant.diffusion.noise import DreamNoise
from starquant.diffusion.samplers import DreamSampler
from starquant.models.dream.config import DreamConfig
from starquant.models.dream.model import DreamModel
from starquant.models.family import Family
from starquant.models.tokenizer import load_byte_level_bpe

__all__ = ["DREAM", "DreamConfig", "DreamModel"]

DREAM = Family(
    name="dream",
    config=DreamConfig,
    model=DreamModel,
    noise=DreamNoise(),
    sampler=DreamSampler,
    tokenizer=load_byte_level_bpe,
    prepend_bos=True,  # official eval/: add_bos_token=true
)
