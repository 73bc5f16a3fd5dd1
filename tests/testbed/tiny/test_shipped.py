"""The embedded models of block diffusion and of experts that are shipped: what they are, and what they answer."""

from __future__ import annotations

import json

import pytest

from starquant.diffusion import BatchSize, MaskPredictor, generate_many
from starquant.errors import ConfigError
from starquant.evaluation.testbed_tasks import items
from starquant.models import load_model, load_tokenizer
from starquant.models.families import family_of
from starquant.testbed import folders
from starquant.testbed.items import Split
from starquant.testbed.tiny import programs, recipes
from starquant.testbed.tiny.shipped import shipped_seeds, weights_folder
from tests.support.specs import spec

FAMILIES = ("sdar", "llada_moe")
FEW = 48


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_loads_its_family(family: str) -> None:
    run = spec(f"model=tiny_{family}")
    assert run.model.seed == 0
    folder = folders.testbed_folder(run.model.testbed, 0)
    assert folder == weights_folder(0, family)
    model = load_model(folder)
    assert family_of(model).name == family
    assert family_of(model).make_sampler(run.model.trajectory).answer_length == 8
    own, made = (one.to_diff_dict() for one in (model.config, recipes.RECIPES[family].new(4).config))
    assert {key: value for key, value in own.items() if key not in ("architectures", "dtype")} == made
    card = json.loads((folder / "training.json").read_text())
    assert (card["family"], card["start"]) == (family, recipes.RECIPES[family].start)
    assert card["steps"] == recipes.RECIPES[family].steps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_that_is_not_shipped_is_named(family: str) -> None:
    assert shipped_seeds(family) == [0]
    with pytest.raises(ConfigError, match=r"model.seed: got 1, allowed: 0 \(the embedded models that are shipped\)"):
        weights_folder(1, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_validation_items_are_answered_far_above_chance(family: str) -> None:
    """Chance is below 2 %: totals are 0 to 59, programs one of 148."""
    folder = weights_folder(0, family)
    model, tokenizer, run = load_model(folder), load_tokenizer(folder), spec(f"model=tiny_{family}")
    for task in ("arithmetic", "programs"):
        own = items(task, Split.VALIDATION)[:FEW]
        settings = run.model.protocol[f"testbed_{task}"].sampler
        assert settings is not None
        sampler = family_of(model).make_sampler(settings)
        prompts = [tokenizer(item.prompt)["input_ids"] for item in own]
        answers = dict(generate_many(MaskPredictor(model), prompts, sampler, batch_size=BatchSize(FEW)))
        texts = [tokenizer.decode(answers[i], skip_special_tokens=True) for i in range(FEW)]
        if task == "arithmetic":
            right = [text == item.answer for text, item in zip(texts, own, strict=True)]
        else:
            right = [programs.solves(text, list(item.hidden)) for text, item in zip(texts, own, strict=True)]
        assert sum(right) >= 0.8 * FEW, (task, sum(right))
