"""LLaDA-MoE against the published implementation, and what of a checkpoint is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from starquant.errors import CheckpointError
from starquant.models import family_of, load_model
from starquant.models.llada import LLaDAConfig
from starquant.models.llada_moe import LLADA_MOE, LLaDAMoEConfig, LLaDAMoEModelLM
from tests.support.models import edit_config
from tests.support.paths import GOLDEN, golden_arrays
from tests.support.patterns import shapes_of_patterns

FOLDER = GOLDEN / "llada_moe_mha"


@torch.no_grad()
def test_every_hidden_state_and_the_logits() -> None:
    model, golden = load_model(FOLDER), golden_arrays("llada_moe_mha")
    assert family_of(model) is LLADA_MOE
    out = model(torch.from_numpy(golden["input_ids"]), output_hidden_states=True)
    names = ["hidden_embed", "hidden_0", "hidden_1", "hidden_2", "hidden_final_norm"]
    for name, got in zip(names, out.hidden_states, strict=True):
        np.testing.assert_allclose(got.numpy(), golden[name], rtol=0, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(out.logits.numpy(), golden["logits"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_routers_choose_the_same_experts_with_the_same_weights() -> None:
    model, golden = load_model(FOLDER), golden_arrays("llada_moe_mha")
    for index, block in enumerate(model.trunk().blocks):
        caught: list[tuple[torch.Tensor, torch.Tensor]] = []
        router = block.mlp.gate
        router.register_forward_hook(lambda _, args, out, into=caught: into.append((args[0], out)))
        model(torch.from_numpy(golden["input_ids"]))
        x_BLD, scores_BLE = caught[0]
        np.testing.assert_allclose(scores_BLE.numpy(), golden[f"router_logits_{index}"], rtol=0, atol=1e-4)
        weight_BLK, chosen_BLK = (t.numpy() for t in router.choose(x_BLD))
        order, theirs = chosen_BLK.argsort(-1), golden[f"router_topk_index_{index}"].argsort(-1)
        for got, key in ((chosen_BLK, "index"), (weight_BLK, "weight")):
            want = np.take_along_axis(golden[f"router_topk_{key}_{index}"], theirs, -1)
            np.testing.assert_allclose(np.take_along_axis(got, order, -1), want, rtol=0, atol=1e-5)


def test_parameters_of_the_published_config() -> None:
    real = GOLDEN / "real_configs" / "llada_moe_7b_a1b_reconstructed"
    with torch.device("meta"):
        model = LLaDAMoEModelLM(LLaDAMoEConfig(**json.loads((real / "config.json").read_text())))
    listed = shapes_of_patterns(GOLDEN / "real_configs" / "llada_moe_parameters.json")
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == listed
    assert len(listed) == 3219
    assert model.mask_token_id == 156895
    assert len(model.linears()) == 16 * (4 + 3 * 64)


@torch.no_grad()
def test_blocks_on_disk_and_what_is_saved_give_the_same_logits(tmp_path: Path) -> None:
    model, ids = load_model(FOLDER), torch.from_numpy(golden_arrays("llada_moe_mha")["input_ids"])
    assert torch.equal(load_model(FOLDER, blocks_on_disk=True)(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert type(again) is LLaDAMoEModelLM
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_auto_classes_tell_it_from_dense_llada(auto: type) -> None:
    model, ids = auto.from_pretrained(FOLDER).eval(), torch.from_numpy(golden_arrays("llada_moe_mha")["input_ids"])
    assert type(model) is LLaDAMoEModelLM
    assert torch.equal(model(ids).logits, load_model(FOLDER)(ids).logits)
    assert type(AutoConfig.from_pretrained(GOLDEN / "llada_mha")) is LLaDAConfig


@torch.no_grad()
def test_a_layer_may_be_dense(tmp_path: Path) -> None:
    config = LLaDAMoEConfig(**json.loads((FOLDER / "config.json").read_text()) | {"moe_layer_freq": [0, 1, 1]})
    model = LLaDAMoEModelLM(config)
    assert len(model.linears()) == 3 * 4 + 3 * (1 + 8 + 8)
    assert bool(model(torch.arange(20)[None]).logits.isfinite().all())


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the fixture with other tensors."""
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_missing_and_unexpected_parameters_are_named(tmp_path: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = tensors.pop(
            "model.layers.1.mlp.experts.7.up_proj.weight"
        )

    with pytest.raises(CheckpointError) as error:
        load_model(rewritten(tmp_path, swap))
    assert "1 parameters are missing: model.layers.1.mlp.experts.7.up_proj.weight" in str(error.value)
    assert "1 parameters are unexpected: model.layers.1.mlp.experts.8.up_proj.weight" in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 6}, r"unexpected: model\.layers\.0\.mlp\.experts\.6\.down_proj\.weight"),
        ({"num_experts": 0}, r"num_experts=0, allowed: a whole number, 1 or more"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok=9, allowed: 1 to num_experts=8"),
        ({"moe_layer_freq": 1}, r"moe_layer_freq=1, allowed: 0 or 1 for each of the 3 layers"),
        ({"moe_layer_freq": [1, 1]}, r"moe_layer_freq=\[1, 1\], allowed: 0 or 1 for each of the 3 layers"),
        (
            {"moe_router_enable_expert_bias": True},
            r"moe_router_enable_expert_bias=True is not supported; allowed: False",
        ),
        ({"qk_layernorm": False}, r"qk_layernorm=False is not supported; allowed: True"),
        ({"mask_token_id": None}, r"mask_token_id is None; allowed: 0 to 399"),
        ({"num_key_value_heads": 4}, r"num_attention_heads=6 is not divisible by num_key_value_heads=4"),
        (
            {"architectures": ["LLaDAModelLM"]},
            r"architectures is \['LLaDAModelLM'\], which is a model of the family 'llada', but the weight files hold "
            r"model\.layers\.\d\.mlp\.experts\.\S+; allowed: LLaDAMoEModelLM",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path: Path, values: dict[str, object], message: str) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
