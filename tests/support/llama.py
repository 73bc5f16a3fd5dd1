"""Small models whose widths are whole blocks of llama.cpp, and their GGUF files."""

from __future__ import annotations

from pathlib import Path

import torch

from starquant.config.bits import BitsSpec
from starquant.llama_cpp.writing import write_gguf
from starquant.models import load_tokenizer
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.models import llada_gqa
from tests.support.specs import spec

KINDS = ("llada_mha", "llada_gqa", "dream_gqa", "dream_tied", "llada_tied")


def block_model(kind: str) -> MaskedDiffusionModel:
    """A random model in float32, gains and biases not the trivial ones."""
    if kind == "llada_gqa":
        return llada_gqa()
    torch.manual_seed(2)
    ids = {"mask_token_id": 199, "eos_token_id": 198, "pad_token_id": 198, "vocab_size": 200}
    if kind.startswith("llada"):
        sizes = {"d_model": 96, "n_heads": 3, "n_kv_heads": 3, "n_layers": 2, "mlp_hidden_size": 160}
        config = LLaDAConfig(**sizes | ids, max_sequence_length=64, init_std=0.15, weight_tying=kind == "llada_tied")  # type: ignore[arg-type]
        model: MaskedDiffusionModel = LLaDAModelLM(config)
    else:
        model = DreamModel(
            DreamConfig(
                hidden_size=96,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.15,
                tie_word_embeddings=kind == "dream_tied",
                **ids,  # type: ignore[arg-type]
            )
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.copy_(1 + 0.5 * torch.rand_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def bits_of_blocks(name: str, kind: str) -> BitsSpec:
    """The preset's bits; a tied head has the embedding's."""
    bits = spec(f"bits={name}").bits
    return bits.model_copy(update={"head": bits.embedding}) if kind.endswith("tied") else bits


def write(model: MaskedDiffusionModel, path: Path, kind: str = "F32") -> Path:
    """Write a model with the embedded model's tokenizer, which llama.cpp does not know."""
    write_gguf(model, load_tokenizer(weights_folder(0)), path, kind)
    return path


def masked_ids(model: MaskedDiffusionModel, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random ids [L], a third of them masked."""
    ids = torch.randint(0, 198, (length,), generator=torch.Generator().manual_seed(seed))
    ids[::3] = model.mask_token_id
    return ids
