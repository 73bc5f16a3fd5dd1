"""Every preset at the published shapes: a model on the meta device, judged before anything is computed."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from starquant.config.methods import METHODS
from starquant.config.methods.star_quant import STaRQuantOptions
from starquant.config.run import RunSpec
from starquant.errors import ConfigError
from starquant.methods.fitted import Fitted
from starquant.methods.star_quant.site_transforms import start_of
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import CONFIG, Checkpoint, read_json
from starquant.models.families import recognize
from starquant.models.validation import skeleton_of
from starquant.runs.packed import with_bits_of
from tests.support.paths import GOLDEN
from tests.support.specs import OPTIONS, compose

#: Model preset -> folder of the published config.json. Dream's base and instruct models have one shape.
PUBLISHED = {"llada": "llada_8b_base", "llada_1_5": "llada_1_5", "dream": "dream_v0_instruct_7b"}


def checkpoint(model: str) -> Checkpoint:
    folder = GOLDEN / "real_configs" / PUBLISHED[model]
    return Checkpoint(folder, read_json(folder / CONFIG), {}, {}, ())


@functools.cache
def skeleton(model: str) -> MaskedDiffusionModel:
    found = skeleton_of(checkpoint(model), recognize(checkpoint(model)).model)
    assert isinstance(found, MaskedDiffusionModel)
    assert found.device == torch.device("meta")
    return found


def run_of(model: str, method: str, bits: str) -> RunSpec:
    """The run of three presets, of which no two change the same key."""
    parts = {"method": compose(f"method={method}")["method"], "bits": compose(f"bits={bits}")["bits"]}
    return RunSpec.from_config(compose(f"model={model}") | parts)


def test_presets_composed_one_by_one_are_those_composed_together() -> None:
    together = compose("model=dream", "method=star_quant_plus", "bits=w8a8")
    assert run_of("dream", "star_quant_plus", "w8a8") == RunSpec.from_config(together)


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("method", OPTIONS["method"])
def test_a_preset_runs_at_every_width_or_names_the_one_that_does(method: str, model: str) -> None:
    for bits in OPTIONS["bits"]:
        run = run_of(model, method, bits).canonical()
        if run.is_packed:
            with pytest.raises(ConfigError, match=r"^method: got packed, but .* is not packed; allowed: method=none, "):
                with_bits_of(run, checkpoint(model))
            continue
        assert with_bits_of(run, checkpoint(model)) == run
        METHODS.build(run.method).validate(skeleton(model), run.bits)


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("method", [name for name in OPTIONS["method"] if name.startswith("star_quant")])
def test_no_preset_multiplies_a_dense_matrix_at_8b(method: str, model: str) -> None:
    """Every site starts from two orthogonal factors that make up its width."""
    options = run_of(model, method, "w4a4").method
    assert isinstance(options, STaRQuantOptions)
    sites = skeleton(model).block_sites(skeleton(model).trunk().blocks[0])
    for site in sites.inputs:
        width = sites.width(site)
        assert width > options.transform.dense_width
        assert not options.transform.reads_moments(width)
        notes = Fitted()
        factors, structure = start_of(sites, site, options, notes)
        assert (structure, len(factors), math.prod(map(len, factors))) == ("kronecker", 2, width)
        for factor in factors:
            eye = torch.eye(len(factor), dtype=torch.float64)
            torch.testing.assert_close(factor @ factor.T, eye, rtol=0, atol=1e-10)
        assert notes.notes == []  # these sizes have Hadamard matrices
