"""SDAR against the published implementation, and what of a checkpoint is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from starquant.diffusion import LikelihoodEstimator, MaskPredictor, ScoreRequest
from starquant.diffusion.likelihood import by_blocks
from starquant.diffusion.noise import DreamNoise, MaskPatterns
from starquant.errors import CheckpointError, ConfigError
from starquant.models import family_of, load_model
from starquant.models.block_causal import BlockCausalModel
from starquant.models.sdar import SDAR, SDARConfig, SDARForCausalLM
from tests.support.models import edit_config
from tests.support.paths import GOLDEN, golden_arrays

FOLDER = GOLDEN / "sdar_gqa"


@pytest.fixture(scope="module")
def z() -> dict[str, np.ndarray]:
    return golden_arrays("sdar_gqa")


@pytest.fixture
def model() -> BlockCausalModel:
    return load_model(FOLDER)


def close(got: Tensor, want: np.ndarray, what: str = "") -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-4, err_msg=what)


@torch.no_grad()
def test_every_hidden_state_and_the_logits(model: BlockCausalModel, z: dict[str, np.ndarray]) -> None:
    assert family_of(model) is SDAR
    ids = torch.from_numpy(z["input_ids"])
    out = model(ids, output_hidden_states=True)
    names = ["hidden_embed", "hidden_0", "hidden_1", "hidden_2", "hidden_final_norm"]
    for name, got in zip(names, out.hidden_states, strict=True):
        close(got, z[name], name)
    close(out.logits, z["logits"])
    with model.blocks_of(ids.shape[1]):
        close(model(ids).logits, z["logits_bidirectional"])
    assert model.block_length == 4


@torch.no_grad()
def test_a_noisy_block_behind_a_clean_prefix_with_and_without_kept_keys(
    model: BlockCausalModel, z: dict[str, np.ndarray]
) -> None:
    names = ("prefix", "noisy", "clean", "next")
    prefix, noisy, clean, later = (torch.from_numpy(z[f"nb_{name}_ids"]) for name in names)
    close(model(torch.cat((prefix, noisy), 1)).logits[:, -4:], z["nb_logits"])
    cache = model.committed_cache()
    cache.ahead(12, 16)
    close(model(torch.cat((prefix, noisy), 1), cache=cache).logits[:, -4:], z["nb_logits_cached"])
    for index, block in enumerate(model.trunk().blocks):
        k, v = cache.kept(block.self_attn.attention)
        close(k, z[f"nb_cache_k_{index}"])
        close(v, z[f"nb_cache_v_{index}"])
    cache.ahead(12, 16)
    close(model(torch.cat((prefix, noisy), 1), cache=cache).logits, z["nb_logits_cached"])
    cache.ahead(16, 20)  # commits the block while it reads the next one
    close(model(torch.cat((prefix, clean, later), 1), cache=cache).logits[:, -4:], z["nb_next_logits_cached"])
    close(model(torch.cat((prefix, clean, later), 1)).logits[:, -4:], z["nb_next_logits"])


@torch.no_grad()
def test_noisy_and_clean_text_in_one_pass(model: BlockCausalModel, z: dict[str, np.ndarray]) -> None:
    """The trainer's layout: its mask, its logits, also beside a longer row and in front of padding."""
    noisy, clean = (torch.from_numpy(z[f"tr_{name}_ids"]) for name in ("noisy", "clean"))
    positions = torch.arange(18).repeat(2)[None]
    mask = model.attention_mask(positions, None)
    assert mask is not None
    assert np.array_equal(mask[0, 0].numpy(), z["tr_mask"])
    both = torch.cat((noisy, clean), 1)
    close(model(both, position_ids=positions).logits[:, :18], z["tr_logits"])
    padded = torch.cat((both, torch.zeros(2, 5, dtype=torch.long)), 1)
    visible = torch.arange(41)[None].expand(2, -1) < 36
    positions = torch.cat((positions, torch.zeros(1, 5, dtype=torch.long)), 1).expand(2, -1)
    close(model(padded, attention_mask=visible, position_ids=positions).logits[:, :18], z["tr_logits"])


def test_a_score_is_weighted_cross_entropy_of_the_trainers_layout(
    model: BlockCausalModel, z: dict[str, np.ndarray]
) -> None:
    noisy, clean = z["tr_noisy_ids"], z["tr_clean_ids"]

    class Trainers(DreamNoise):
        def draw(self, length: int, mc_num: int, generator: torch.Generator) -> MaskPatterns:
            blocks = [b for b in range(0, 18, 4) if len(clean[row, b : b + 4]) == length and b not in taken]
            taken.append(blocks[0])
            masked = torch.from_numpy(noisy[row, blocks[0] : blocks[0] + 4] == model.mask_token_id)
            return MaskPatterns(masked[None], torch.ones(1, dtype=torch.float64))

    for row in range(2):
        taken: list[int] = []
        estimator = LikelihoodEstimator(Trainers(), 1, most_patterns=0)
        score = estimator.score(MaskPredictor(model), [ScoreRequest((), tuple(clean[row].tolist()))])[0]
        assert score == pytest.approx(-float(z["tr_ce"][row].sum()), abs=1e-3)


def test_a_score_is_the_sum_of_its_blocks_and_exact_where_patterns_are_few(model: BlockCausalModel) -> None:
    prompt, target = (7, 8, 9, 10, 11, 12), (20, 21, 22, 23, 24)
    parts = by_blocks(ScoreRequest(prompt, target), 4)
    assert [(len(part.prompt), part.target) for part in parts] == [(6, (20, 21)), (8, (22, 23, 24))]
    few = LikelihoodEstimator(SDAR.noise, 7)
    [score] = few.score(MaskPredictor(model), [ScoreRequest(prompt, target)])
    total = 0.0
    for part in parts:
        length = len(part.target)
        for code in range(1, 2**length):
            masked = torch.tensor([bool(code >> i & 1) for i in range(length)])
            grid = torch.linspace(1e-3, 1, 200_001, dtype=torch.float64)
            count = int(masked.sum())
            weight = float(torch.trapezoid(grid ** (count - 1) * (1 - grid) ** (length - count), grid)) / (1 - 1e-3)
            ids = torch.tensor([[*part.prompt, *torch.tensor(part.target).masked_fill(masked, 300).tolist()]])
            with torch.no_grad():
                log_p = model(ids).logits[0, len(part.prompt) :].log_softmax(-1)
            total += weight * float(log_p[masked, torch.tensor(part.target)[masked]].sum())
    assert score == pytest.approx(total, rel=1e-4)
    with pytest.raises(ConfigError, match=r"cfg_scale: got 0\.5, allowed: 0 with block diffusion"):
        LikelihoodEstimator(SDAR.noise, 7, cfg_scale=0.5).score(MaskPredictor(model), [ScoreRequest(prompt, target)])
    assert LikelihoodEstimator(SDAR.noise, 7).score(MaskPredictor(model), [ScoreRequest(prompt, ())]) == [0.0]


@pytest.mark.parametrize(("real", "tensors"), [("sdar_4b", 399), ("sdar_8b", 399)])
def test_parameters_of_the_published_configs(real: str, tensors: int) -> None:
    config = json.loads((GOLDEN / "real_configs" / f"{real}_chat" / "config.json").read_text())
    with torch.device("meta"):
        model = SDARForCausalLM(SDARConfig(**config))
    listed = json.loads((GOLDEN / "real_configs" / f"{real}_parameters.json").read_text())
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == listed
    assert len(listed) == tensors
    assert (model.mask_token_id, model.config.eot_token_id, model.block_length) == (151669, 151645, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0}, r"block_size=0, allowed: a whole number, 1 to the context's 256"),
        ({"block_size": 257}, r"block_size=257, allowed: a whole number, 1 to the context's 256"),
        ({"head_dim": 24}, r"misshapen: model\.layers\.0\.self_attn\.q_proj\.weight has shape \[128, 96\]"),
        ({"attention_bias": True}, r"attention_bias=True is not supported; allowed: False"),
        ({"use_sliding_window": True}, r"use_sliding_window=True is not supported; allowed: False"),
        ({"num_hidden_layers": 2}, r"unexpected: model\.layers\.2\.input_layernorm\.weight"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path: Path, values: dict[str, object], message: str) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
