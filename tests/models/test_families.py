"""Which family a config.json, and a model, is of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from starquant.errors import ConfigError
from starquant.models import FAMILIES, Family, family_of, load_tokenizer
from starquant.models.families import family_in
from starquant.models.llada import LLADA, LLaDAModelLM
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.models import fresh_tiny

NAMES = ["a_mixture", "z_mixture"]  # before and behind "llada"


class Mixture(LLaDAModelLM):
    """Stands for a family that shares its `model_type` with LLaDA."""


@pytest.fixture(params=NAMES)
def mixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Family:
    family = Family(
        name=request.param,
        config=LLADA.config,
        model=Mixture,
        noise=LLADA.noise,
        sampler=LLADA.sampler,
        tokenizer=lambda folder: SimpleNamespace(get_vocab=dict, mask_token_id=None, of=folder),  # type: ignore[arg-type, return-value]
        architectures=("Mixture",),
    )
    monkeypatch.setattr(f"{__name__}.MIXTURE", family, raising=False)
    monkeypatch.setattr(FAMILIES, "_targets", {**FAMILIES._targets, request.param: f"{__name__}:MIXTURE"})
    return family


def test_families_of_one_model_type_are_told_apart_by_architectures(mixture: Family, tmp_path: Path) -> None:
    assert family_in({"model_type": "llada", "architectures": ["Mixture"]}) is mixture
    assert family_in({"model_type": "llada", "architectures": ["LLaDAModelLM"]}) is LLADA
    assert family_in({"model_type": "llada"}) is LLADA
    assert family_in({"model_type": "bert"}) is None
    (tmp_path / "config.json").write_text('{"model_type": "llada", "architectures": ["Mixture"]}')
    assert load_tokenizer(tmp_path).of == tmp_path
    assert not hasattr(load_tokenizer(weights_folder(0)), "of")


def test_a_model_of_no_family_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_tiny()
    assert family_of(model) is LLADA
    monkeypatch.setattr(FAMILIES, "_targets", {"dream": FAMILIES["dream"]})
    with pytest.raises(ConfigError, match=r"LLaDAModelLM is of no family in models\.families; known: dream"):
        family_of(model)
