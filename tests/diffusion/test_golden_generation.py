"""The official samplers' generations, token for token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from starquant.diffusion import DreamSampler, LLaDASampler, generate
from starquant.models import load_model
from tests.support.paths import GOLDEN, golden_arrays


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("architecture", ["llada_mha", "llada_moe_mha"])
def test_llada(architecture: str, i: int) -> None:
    z = golden_arrays(architecture)
    sampler = LLaDASampler(
        steps=int(z[f"gen{i}_steps"]),
        gen_length=int(z[f"gen{i}_gen_length"]),
        block_length=int(z[f"gen{i}_block_length"]),
        cfg_scale=float(z[f"gen{i}_cfg_scale"]),
    )
    prompt = torch.tensor(z[f"gen{i}_prompt_ids"])
    out = generate(load_model(GOLDEN / architecture), prompt, sampler)
    assert np.array_equal(out.numpy(), z[f"gen{i}_output_ids"])


@pytest.mark.parametrize("i", range(4))
def test_dream_with_history(i: int) -> None:
    z = golden_arrays("dream_gqa")
    sampler = DreamSampler(
        steps=int(z[f"gen{i}_steps"]),
        max_new_tokens=int(z[f"gen{i}_max_new_tokens"]),
        alg=str(z[f"gen{i}_alg"]),
        eps=float(z[f"gen{i}_eps"]),
    )
    history: list[np.ndarray] = []
    prompt = torch.tensor(z[f"gen{i}_prompt_ids"])
    out = generate(
        load_model(GOLDEN / "dream_gqa"), prompt, sampler, on_step=lambda _, ids, __: history.append(ids.numpy().copy())
    )
    assert np.array_equal(out.numpy(), z[f"gen{i}_output_ids"])
    assert np.array_equal(np.stack(history), z[f"gen{i}_history"])
