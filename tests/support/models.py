"""Small models of every family, and what they compute."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import nn

from starquant.diffusion.trajectories import record_trajectory
from starquant.models import family_of, load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from starquant.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from starquant.models.sdar import SDARConfig, SDARForCausalLM
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.paths import GOLDEN

ARCHITECTURES = ("llada_mha", "llada_gqa", "dream_gqa")


def llada_gqa(**more: object) -> MaskedDiffusionModel:
    """A random LLaDA with two value heads for six query heads, and gains that differ."""
    torch.manual_seed(1)
    sizes = {"d_model": 96, "n_heads": 6, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 160, "vocab_size": 200}
    ids = {"mask_token_id": 199, "eos_token_id": 198, "pad_token_id": 198}
    model = LLaDAModelLM(LLaDAConfig(**sizes | ids | more, max_sequence_length=64, init_std=0.15))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.copy_(1 + 0.5 * torch.rand_like(parameter))
    return model.eval()


def mixture() -> MaskedDiffusionModel:
    """A random LLaDA-MoE of two layers, two of four experts a token, with gains that differ."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_size": 24}
    ids = {"mask_token_id": 119, "eos_token_id": 118, "pad_token_id": 118}
    model = LLaDAMoEModelLM(LLaDAMoEConfig(**sizes | experts | ids, initializer_range=0.15))
    return with_uneven_gains(model)


def sdar() -> MaskedDiffusionModel:
    """A random SDAR of two layers, blocks of 4, two value heads for four, with gains that differ."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 16, "intermediate_size": 80, "vocab_size": 120, "mask_token_id": 119, "eos_token_id": 118}
    return with_uneven_gains(SDARForCausalLM(SDARConfig(**sizes | more, initializer_range=0.15)))


def llada2() -> MaskedDiffusionModel:
    """A random LLaDA2: a dense layer and one of four experts in two groups beside a shared one, blocks of 4."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 16, "intermediate_size": 80, "moe_intermediate_size": 24, "vocab_size": 120}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "block_length": 4}
    ids = {"mask_token_id": 119, "eos_token_id": 118, "pad_token_id": 118}
    model = LLaDA2MoeModelLM(LLaDA2MoeConfig(**sizes | more | experts | ids, initializer_range=0.15))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.expert_bias.copy_(0.1 * torch.randn(4))
    return with_uneven_gains(model)


def with_uneven_gains(model: MaskedDiffusionModel) -> MaskedDiffusionModel:
    """The model with norms whose gains differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.5 * torch.rand_like(parameter))
    return model.eval()


MADE = {"llada_gqa": llada_gqa, "mixture": mixture, "sdar": sdar, "llada2": llada2}


def fresh(architecture: str) -> MaskedDiffusionModel:
    return MADE[architecture]() if architecture in MADE else load_model(GOLDEN / architecture)


def fresh_tiny() -> MaskedDiffusionModel:
    return load_model(weights_folder(0))


def logits(model: MaskedDiffusionModel, ids: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=visible).logits


def trajectory(model: MaskedDiffusionModel) -> torch.Tensor:
    """States [S, L] of one full-precision trajectory, mask ratios 1 to 0."""
    sampler = family_of(model).sampler.of_length(12)
    found = record_trajectory(model, torch.tensor([[5, 6, 7, 8]]), sampler)
    masked_SL = found.ids_SBL[:, 0, 4:] == found.mask_id
    assert bool(masked_SL[0].all()) and not bool(masked_SL[-1].any())
    return found.ids_SBL[:, 0]


def edit_config(folder: Path, **values: object) -> None:
    """Change values of a checkpoint's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def hooks_of(module: nn.Module) -> list[object]:
    return [h for m in module.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def perturbed(model: MaskedDiffusionModel, size: float = 0.05) -> MaskedDiffusionModel:
    """A copy whose every parameter is off by some noise."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=generator)
    return other
