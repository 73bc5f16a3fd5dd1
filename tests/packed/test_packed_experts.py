"""A packed mixture of experts: loaded by transformers, the same numbers, half a byte a weight of every expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import starquant.packed  # noqa: F401  # tells transformers of the format
from starquant.errors import ConfigError
from starquant.models.cuda_graphs import replayed
from starquant.packed.description import use_integers
from starquant.packed.export import export
from starquant.quantized.manifest import manifest_of
from starquant.quantized.packed_linear import PackedLinear
from tests.support.methods import fitted_once, method_named
from tests.support.models import fresh, logits, trajectory
from tests.support.records import make_record
from tests.support.specs import spec


@pytest.mark.parametrize(
    ("architecture", "name", "sites"),
    [("mixture", "rtn", 14), ("mixture", "star_quant_plus", 14), ("llada2", "quarot", 12), ("sdar", "rtn", 8)],
)
def test_what_is_packed_loads_again(architecture: str, name: str, sites: int, tmp_path: Path) -> None:
    method, bits = method_named(name, "bits=w4a4")
    learned, source, target = fitted_once(name, architecture), tmp_path / "source", tmp_path / "packed"
    fresh(architecture).save_pretrained(source)
    fake, model = fresh(architecture), fresh(architecture)
    method.apply(fake, learned, bits)
    manifest = method.apply(model, learned, bits, packed=True)
    export(model, make_record(spec("bits=w4a4", f"method={name}")), source, target)
    loaded, ids = AutoModel.from_pretrained(target), trajectory(fresh(architecture))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    torch.testing.assert_close(logits(loaded, ids), logits(fake, ids), rtol=1e-4, atol=1e-4)
    packed = {name for name, module in loaded.named_modules() if isinstance(module, PackedLinear)}
    assert packed == {*fresh(architecture).linears()}
    down = list(loaded.linears().values())[-1].module
    assert down.codes.numel() * 2 == down.in_features * down.out_features
    read = [(entry.name, entry.weight_bits) for entry in manifest_of(loaded) if entry.kind in ("linear", "router")]
    assert read == [(entry.name, entry.weight_bits) for entry in manifest if entry.kind in ("linear", "router")]
    assert use_integers(loaded) == sites
    near = torch.isclose(logits(loaded, ids), logits(model, ids), rtol=1e-3, atol=1e-3).all(-1)
    assert near.float().mean() >= 0.98  # sums in another order turn a code that lies between two, here of a token's


def test_passes_of_a_mixture_are_not_replayed() -> None:
    with (
        pytest.raises(ConfigError, match="graphs: the tokens of an expert are others in every pass"),
        replayed(fresh("mixture")),
    ):
        pass
