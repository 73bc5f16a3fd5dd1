"""Attention operands of packed checkpoints: the words of their transforms, and static scales that are no scales."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from starquant.errors import CheckpointError, ConfigError
from starquant.models import load_model
from starquant.packed.export import export
from starquant.quantized.attention import KeyValueGrid, QuantizedAttentionCore
from starquant.quantized.manifest import manifest_of
from starquant.store.manifest import ManifestEntry
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.methods import method_named
from tests.support.models import fresh
from tests.support.records import make_record
from tests.support.specs import spec
from tests.support.states import states_of

OPERANDS = tuple(f"bits.attention.{operand}=4" for operand in "qkpv")

ON_VALUES = ["method.tac.placement=value", "method.tac.condition=all", "bits.attention.p=16", "bits.attention.v=16"]


def packed(folder: Path, name: str, *settings: str) -> list[ManifestEntry]:
    """Export a model under a method; returns the manifest of its application."""
    method, bits = method_named(name, "bits=w4a4", *OPERANDS, *settings)
    model = fresh("llada_gqa")
    entries = method.apply(model, method.fit(model, bits, states_of(model)), bits, packed=True)
    export(model, make_record(spec()), weights_folder(0), folder)
    return entries


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("quarot_rtn", ["method.qk_hadamard=true"]),
        ("star_quant", ON_VALUES),
        ("rtn", []),
        ("flatquant", ["method.batch=4"]),
    ],
)
def test_a_loaded_model_tells_the_transforms_that_were_applied(name: str, settings: list[str], tmp_path: Path) -> None:
    quick = ["method.transform.steps=2"] if name == "star_quant" else []
    entries = packed(tmp_path / "p", name, *settings, *quick)
    applied = {(e.block, e.role): e.transform for e in entries if e.kind == "operand"}
    loaded = {(e.block, e.role): e.transform for e in manifest_of(load_model(tmp_path / "p")) if e.kind == "operand"}
    assert loaded == applied
    assert any(loaded.values()) == bool(settings)


def test_a_loaded_model_has_the_grid_of_keys_and_values(tmp_path: Path) -> None:
    packed(tmp_path / "p", "quarot_rtn")
    model = load_model(tmp_path / "p")
    cores = [m for m in model.modules() if isinstance(m, QuantizedAttentionCore)]
    assert cores and all(core.kv == KeyValueGrid(symmetric=False, clip_ratio=0.95) for core in cores)


def test_static_scales_need_a_symmetric_grid() -> None:
    method, bits = method_named("dllmquant_plus_plus", *OPERANDS, "bits.attention.kv_symmetric=false")
    with pytest.raises(ConfigError, match=r"^bits.attention.kv_symmetric: got false, .*; allowed: true, or"):
        method.validate(fresh("llada_gqa"), bits)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_static_scales_that_are_not_above_0_are_named(scale: float, tmp_path: Path) -> None:
    packed(tmp_path / "p", "dllmquant_plus_plus")
    file = tmp_path / "p" / "model.safetensors"
    tensors = load_file(file)
    (name, *_) = (name for name in tensors if name.endswith("v_scale_KE"))
    tensors[name][0, 0] = scale
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}: scales must be finite and above 0"):
        load_model(tmp_path / "p")
