"""The native models against the outputs of the published implementations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from starquant.models import load_model
from starquant.models.base import MaskedDiffusionModel
from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from tests.support.paths import FAMILIES, GOLDEN, golden_arrays

CLASSES = {"llada_mha": LLaDAModelLM, "dream_gqa": DreamModel}
REAL = {
    "llada_8b_base": (LLaDAConfig, LLaDAModelLM, "llada_8b_parameters.json"),
    "llada_8b_instruct": (LLaDAConfig, LLaDAModelLM, "llada_8b_parameters.json"),
    "llada_1_5": (LLaDAConfig, LLaDAModelLM, "llada_8b_parameters.json"),
    "dream_v0_instruct_7b": (DreamConfig, DreamModel, "dream_7b_parameters.json"),
}


def golden_ids(family: str) -> torch.Tensor:
    return torch.from_numpy(golden_arrays(family)["input_ids"])


@torch.no_grad()
def test_every_hidden_state_and_the_logits(family: str, golden_model: MaskedDiffusionModel) -> None:
    golden = golden_arrays(family)
    names = ["hidden_embed", "hidden_0", "hidden_1", "hidden_2", "hidden_final_norm"]
    out = golden_model(golden_ids(family), output_hidden_states=True)
    assert len(out.hidden_states) == len(names)
    for name, got in zip(names, out.hidden_states, strict=True):
        np.testing.assert_allclose(got.numpy(), golden[name], rtol=0, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(out.logits.numpy(), golden["logits"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_hidden_states_come_only_on_request(family: str, golden_model: MaskedDiffusionModel) -> None:
    assert golden_model(golden_ids(family)).hidden_states is None


@pytest.mark.parametrize("real", REAL)
def test_parameters_of_the_published_configs(real: str) -> None:
    config_class, model_class, listing = REAL[real]
    config = config_class.from_pretrained(GOLDEN / "real_configs" / real)
    with torch.device("meta"):
        model = model_class(config)
    got = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert got == json.loads((GOLDEN / "real_configs" / listing).read_text())["parameters"]
    assert set(model.state_dict()) == set(got), "nothing but parameters may be saved"


@torch.no_grad()
def test_bfloat16_stays_close(family: str) -> None:
    model = load_model(GOLDEN / family, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = model(golden_ids(family)).logits
    assert logits.dtype == torch.bfloat16
    difference = np.abs(logits.float().numpy() - golden_arrays(family)["logits"]).max()
    assert 0 < difference <= 0.4


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_auto_classes_need_no_remote_code(auto: type, family: str, golden_model: MaskedDiffusionModel) -> None:
    model = auto.from_pretrained(GOLDEN / family).eval()
    assert type(model) is type(golden_model) is CLASSES[family]
    assert type(AutoConfig.from_pretrained(GOLDEN / family)) is type(golden_model.config)
    ids = golden_ids(family)
    assert torch.equal(model(ids).logits, golden_model(ids).logits)


@torch.no_grad()
def test_logit_positions_select_from_the_full_head(family: str, golden_model: MaskedDiffusionModel) -> None:
    ids = golden_ids(family)
    rows, columns = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([5, 0, 23, 7, 5])
    full, chosen = golden_model(ids).logits, golden_model(ids, logit_positions=(rows, columns)).logits
    assert chosen.shape == (5, full.shape[-1])
    for got, row, column in zip(chosen, rows.tolist(), columns.tolist(), strict=True):
        torch.testing.assert_close(got, full[row, column], rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_position_gives_no_logits(family: str, golden_model: MaskedDiffusionModel) -> None:
    none = torch.empty(0, dtype=torch.long)
    logits = golden_model(golden_ids(family), logit_positions=(none, none)).logits
    assert logits.shape == (0, golden_arrays(family)["logits"].shape[-1])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_model_is_in_evaluation_mode_with_the_configured_mask(name: str) -> None:
    model = load_model(str(GOLDEN / name))
    assert not any(module.training for module in model.modules())
    assert model.mask_token_id == 500


def test_habits_that_differ_between_the_families() -> None:
    # Dream predicts position i from i - 1 and is evaluated with a beginning-of-text token; LLaDA does neither.
    assert (LLaDAModelLM.logit_offset, LLaDAModelLM.prepend_bos, LLaDAModelLM.likelihood_noise) == (0, False, "llada")
    assert (DreamModel.logit_offset, DreamModel.prepend_bos, DreamModel.likelihood_noise) == (-1, True, "dream")


@pytest.mark.parametrize("real", [name for name in REAL if name.startswith("llada")])
def test_end_of_turn_follows_from_the_published_vocabulary(real: str) -> None:
    assert LLaDAConfig.from_pretrained(GOLDEN / "real_configs" / real).eot_token_id == 126348
    assert LLaDAConfig(eos_token_id=126081, eot_token_id=5).eot_token_id == 5
    assert LLaDAConfig.from_pretrained(GOLDEN / "llada_mha").eot_token_id is None
