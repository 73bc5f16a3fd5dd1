"""A packed model of block diffusion: clip ratios, gates and maps of every token state, and keys rounded at commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import starquant.packed  # noqa: F401  # tells transformers of the format
from starquant.diffusion import LLaDA21Sampler, SDARSampler, generate
from starquant.errors import CheckpointError
from starquant.packed.description import use_integers
from starquant.packed.export import export
from tests.support.methods import fitted_once, method_named
from tests.support.models import fresh, logits
from tests.support.records import make_record
from tests.support.specs import spec

FOUR = ("bits=w4a4", "bits.attention.k=4", "bits.attention.v=4")
CASES = [("sdar", "star_quant"), ("llada2", "star_quant"), ("llada2", "star_quant_plus"), ("sdar", "freeact")]


def exported(architecture: str, name: str, folder: Path) -> Path:
    method, bits = method_named(name, *FOUR)
    bits = bits.model_copy(update={"attention": bits.attention.model_copy(update={"kv_at": "commit"})})
    model = fresh(architecture)
    model.save_pretrained(folder / "source")
    method.apply(model, fitted_once(name, architecture), bits, packed=True)
    run = spec(*FOUR, "bits.attention.kv_at=commit", f"method={name}")
    export(model, make_record(run), folder / "source", folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_it_gives_what_fake_quantization_gives(architecture: str, name: str, tmp_path: Path) -> None:
    """A pass whose tokens have every state, and a whole generation, with kept keys."""
    method, bits = method_named(name, *FOUR)
    bits = bits.model_copy(update={"attention": bits.attention.model_copy(update={"kv_at": "commit"})})
    fake = fresh(architecture)
    method.apply(fake, fitted_once(name, architecture), bits)
    loaded = AutoModel.from_pretrained(exported(architecture, name, tmp_path))
    ids = torch.randint(0, 110, (4, 18), generator=torch.Generator().manual_seed(1))
    ids[:2, 9:11] = ids[1, 16:] = 119
    states = {fake.states[i].value for i in fake.context(ids).state_BL.unique().tolist()}
    assert states == {state.value for state in fake.states}
    torch.testing.assert_close(logits(loaded, ids), logits(fake, ids), rtol=1e-4, atol=1e-4)
    sampler = SDARSampler(16, 4) if architecture == "sdar" else LLaDA21Sampler(16, 4, editing_threshold=0.3)
    tokens = generate(fake, ids[3:, :6], sampler)
    assert torch.equal(generate(loaded, ids[3:, :6], sampler), tokens)
    assert use_integers(loaded) > 0
    found, whole = logits(loaded, ids), logits(fake, ids)
    assert float((found - whole).norm() / whole.norm()) < 0.02  # codes on an edge may fall to the other side


def test_ratios_of_two_states_do_not_fit_a_model_that_has_three(tmp_path: Path) -> None:
    folder = exported("sdar", "star_quant", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    site = next(data for name, data in modules.items() if name.endswith("0.self_attn.out_input"))
    site["transform"]["correction"]["shape"][0] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="shape: got 2 conditions, allowed: 1, or 3 token states a bin"):
        AutoModel.from_pretrained(folder)
