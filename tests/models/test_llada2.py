"""LLaDA2 against the published implementation, and what of a checkpoint is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from starquant.errors import CheckpointError, ConfigError
from starquant.models import family_of, load_model
from starquant.models.block_causal import BlockCausalModel
from starquant.models.fused import fuse_shapes
from starquant.models.llada2 import LLADA2, LLaDA2MoeConfig, LLaDA2MoeModelLM
from tests.support.models import edit_config
from tests.support.paths import GOLDEN, golden_arrays
from tests.support.patterns import shapes_of_patterns
from tests.support.specs import spec

FOLDER = GOLDEN / "llada2_moe_a"
BLOCK = 8


@pytest.fixture(scope="module")
def z() -> dict[str, np.ndarray]:
    return golden_arrays("llada2_moe_a")


@pytest.fixture(scope="module")
def model() -> BlockCausalModel:
    return load_model(FOLDER)


def close(got: Tensor, want: np.ndarray, what: str = "") -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-4, err_msg=what)


@torch.no_grad()
def test_every_hidden_state_and_the_logits(model: BlockCausalModel, z: dict[str, np.ndarray]) -> None:
    assert family_of(model) is LLADA2
    ids = torch.from_numpy(z["input_ids"])
    names = ["hidden_embed", *(f"hidden_{i}" for i in range(4)), "hidden_final_norm"]
    with model.blocks_of(BLOCK):
        out = model(ids, output_hidden_states=True)
    for name, got in zip(names, out.hidden_states, strict=True):
        close(got, z[name], name)
    close(out.logits, z["logits"])
    with model.blocks_of(ids.shape[1]):
        close(model(ids).logits, z["logits_bidirectional"])


@torch.no_grad()
def test_routers_choose_the_same_experts_with_the_same_weights(
    model: BlockCausalModel, z: dict[str, np.ndarray]
) -> None:
    for index in (1, 2, 3):
        caught: list[tuple[Tensor, Tensor]] = []
        router = model.trunk().blocks[index].mlp.gate
        handle = router.register_forward_hook(lambda _, args, out, into=caught: into.append((args[0], out)))
        with model.blocks_of(BLOCK):
            model(torch.from_numpy(z["input_ids"]))
        handle.remove()
        x_BLD, scores_BLE = caught[0]
        close(scores_BLE, z[f"router_logits_{index}"])
        weight_BLK, chosen_BLK = (t.numpy() for t in router.choose(x_BLD))
        ours, theirs = chosen_BLK.argsort(-1), z[f"router_topk_index_{index}"].argsort(-1)
        for got, key in ((chosen_BLK, "index"), (weight_BLK, "weight")):
            want = np.take_along_axis(z[f"router_topk_{key}_{index}"], theirs, -1)
            np.testing.assert_allclose(np.take_along_axis(got, ours, -1), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_noisy_block_behind_a_clean_prefix_with_and_without_kept_keys(
    model: BlockCausalModel, z: dict[str, np.ndarray]
) -> None:
    names, cache = ("prefix", "noisy", "clean", "next"), model.committed_cache()
    prefix, noisy, clean, later = (torch.from_numpy(z[f"nb_{name}_ids"]) for name in names)
    with model.blocks_of(BLOCK):
        close(model(torch.cat((prefix, noisy), 1)).logits[:, -8:], z["nb_logits"])
        cache.ahead(24, 32)
        close(model(torch.cat((prefix, noisy), 1), cache=cache).logits[:, -8:], z["nb_logits_cached"])
        for index, block in enumerate(model.trunk().blocks):
            for kept, name in zip(cache.kept(block.attention.attention), "kv", strict=True):
                close(kept, z[f"nb_cache_{name}_{index}"])
        cache.ahead(32, 40)
        close(model(torch.cat((prefix, clean, later), 1), cache=cache).logits[:, -8:], z["nb_next_logits_cached"])
        close(model(torch.cat((prefix, clean, later), 1)).logits[:, -8:], z["nb_next_logits"])


@torch.no_grad()
def test_noisy_and_clean_text_in_one_pass(model: BlockCausalModel, z: dict[str, np.ndarray]) -> None:
    """The trainer's layout: its mask, its logits."""
    both = [torch.from_numpy(z[f"tr_{name}_ids"]) for name in ("noisy", "clean")]
    positions = torch.arange(28).repeat(2)[None]
    with model.blocks_of(BLOCK):
        mask = model.attention_mask(positions, None)
        assert mask is not None
        assert np.array_equal(mask[0, 0].numpy(), z["tr_mask"])
        close(model(torch.cat(both, 1), position_ids=positions).logits[:, :28], z["tr_logits"])


@pytest.mark.parametrize("real", ["llada2_mini", "llada2_flash"])
def test_parameters_of_the_published_configs(real: str) -> None:
    config = json.loads((GOLDEN / "real_configs" / f"{real}_dfactory" / "config.json").read_text())
    del config["model_type"]  # of the trainer's form
    config["num_hidden_layers"], config["num_experts"] = 3, 16  # of 20 and 256: patterns repeat
    with torch.device("meta"):
        model = LLaDA2MoeModelLM(LLaDA2MoeConfig(**config))
    shapes = fuse_shapes({name: tuple(t.shape) for name, t in model.state_dict().items()}, model.fused)
    listed = shapes_of_patterns(GOLDEN / "real_configs" / f"{real}_parameters.json")
    beyond = {*(f"layers.{i}" for i in range(3, 32)), *(f"experts.{e}" for e in range(16, 256))}
    small = {
        name: (16, *shape[1:]) if ".mlp.gate." in name else shape
        for name, shape in listed.items()
        if not beyond & set(re.findall(r"(?:layers|experts)\.\d+", name))
    }
    assert shapes == small
    assert (model.mask_token_id, model.config.eos_token_id, model.block_length) == (156895, 156892, 32)


@torch.no_grad()
def test_fused_projections_are_split_and_saved_as_they_were(model: BlockCausalModel, tmp_path: Path) -> None:
    ids = torch.arange(40)[None]
    want, stored = model(ids).logits, load_file(FOLDER / "model.safetensors")
    name = "model.layers.1.attention.query_key_value.weight"
    attention = model.trunk().blocks[1].attention
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(torch.cat(parts), stored[name])
    assert torch.equal(load_model(FOLDER, blocks_on_disk=True)(ids).logits, want)
    assert torch.equal(AutoModel.from_pretrained(FOLDER).eval()(ids).logits, want)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], stored[key]) for key in stored)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_routers_bias_stays_in_float32(on_disk: bool) -> None:
    model = load_model(FOLDER, dtype="bfloat16", blocks_on_disk=on_disk)
    router = model.trunk().blocks[1].mlp.gate
    caught: list[torch.dtype] = []
    router.register_forward_hook(lambda module, _, out: caught.append(module.expert_bias.dtype))
    with torch.no_grad():
        model(torch.arange(40)[None])
    assert caught == [torch.float32]


def changed(folder: Path, **tensors: Tensor | None) -> Path:
    """A copy of the fixture with other tensors, None for without."""
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    stored = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.1.mlp.gate.expert_bias": None}, r"missing: model\.layers\.1\.mlp\.gate\.expert_bias"),
        (
            {"model.layers.2.mlp.gate.expert_bias": torch.zeros(7)},
            r"model\.layers\.2\.mlp\.gate\.expert_bias has shape \[7\], config\.json implies \[8\]",
        ),
        (
            {"model.layers.0.attention.query_key_value.weight": torch.ones(200, 64)},
            r"query_key_value\.weight has shape \[200, 64\], config\.json implies \[256, 64\]",
        ),
        (
            {"model.layers.1.mlp.experts.8.up_proj.weight": torch.ones(40, 64)},
            r"unexpected: model\.layers\.1\.mlp\.exp",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_named(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(changed(tmp_path, **tensors))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 12}, r"missing: model\.layers\.1\.mlp\.experts\.10\.down_proj\.weight"),
        ({"n_group": 3}, r"num_experts=8 is not divisible by n_group=3"),
        ({"n_group": 8}, r"n_group=8, allowed: 1 to 4, with two or more of the num_experts=8 in each"),
        ({"topk_group": 5}, r"topk_group=5, allowed: 1 to n_group=4"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok=5, allowed: 1 to 4, the experts of topk_group=2 groups"),
        ({"use_qkv_bias": True}, r"use_qkv_bias=True is not supported; allowed: False"),
        ({"use_qk_norm": False}, r"use_qk_norm=False is not supported; allowed: True"),
        ({"partial_rotary_factor": 0.1}, r"partial_rotary_factor=0\.1 turns 3 of head_dim=32 dimensions"),
        ({"routed_scaling_factor": None}, r"routed_scaling_factor=None, allowed: a number above 0"),
        ({"routed_scaling_factor": -1}, r"routed_scaling_factor=-1, allowed: a number above 0"),
        ({"block_length": 0}, r"block_length=0, allowed: a whole number, 1 to the context's 512"),
        ({"mask_token_id": None}, r"mask_token_id is None; allowed: 0 to 399"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path: Path, values: dict[str, object], message: str) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_both_samplers_fit_the_family() -> None:
    for name in ("llada2_mini", "llada2_1_mini"):
        settings = spec(f"model={name}").model.trajectory
        assert LLADA2.make_sampler(settings).name == settings.name
    with pytest.raises(ConfigError, match="sampler 'sdar' does not fit a model of the family 'llada2'"):
        LLADA2.make_sampler(spec("model=sdar_4b").model.trajectory)
