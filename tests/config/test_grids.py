"""Whose grid a run is on: what the canonical form holds, and which runs are one."""

from __future__ import annotations

import pytest

from starquant.config.bits import in_words
from starquant.config.run import RunSpec
from starquant.errors import ConfigError
from tests.support.specs import spec


def canonical(*overrides: str) -> RunSpec:
    return spec("bits=w4a4", *overrides).canonical()


def test_the_authors_grid_is_in_the_bits() -> None:
    smooth = canonical("method=smoothquant").bits
    assert (smooth.weights.symmetric, smooth.activations.symmetric) == (False, False)
    assert in_words(smooth.model_dump()) == "w4a4 [activations asymmetric, weights asymmetric]"
    assert canonical("method=quarot").bits.activations.clip_ratio == 0.9
    assert canonical("method=quarot").bits.attention == spec().bits.attention  # K and V are not quantized


def test_keys_and_values_too_where_they_are_quantized() -> None:
    bits = spec("bits=w4a4_softmax_v", "method=quarot").canonical().bits
    assert (bits.attention.kv_symmetric, bits.attention.kv_clip_ratio) == (False, 0.95)
    assert in_words(bits.model_dump()) == (
        "w4a4_softmax_v (w4a4) [activations clip=0.9, kv asymmetric, kv clip=0.95, p=4, v=4]"
    )
    flat = spec("bits=w4a4_softmax_v", "method=flatquant").canonical().bits
    assert (flat.attention.kv_symmetric, flat.attention.kv_clip_ratio) == (False, 1.0)
    static = spec("bits=w4a4_softmax_v", "method=dllmquant_plus_plus").canonical().bits
    assert (static.attention.kv_symmetric, static.attention.kv_clip_ratio) == (True, 1.0)


@pytest.mark.parametrize(
    "method", ["smoothquant", "awq", "quarot", "dllmquant_plus", "dllmquant_plus_plus", "star_quant_plus"]
)
def test_two_grids_are_two_runs(method: str) -> None:
    own, common = canonical(f"method={method}"), canonical(f"method={method}", "bits.grid=common")
    assert own.digest() != common.digest() and own.calibration_digest() != common.calibration_digest()
    assert common.bits == spec("bits=w4a4", "bits.grid=common").bits


@pytest.mark.parametrize("method", ["none", "rtn", "gptq", "star_quant"])
def test_a_method_of_one_grid_is_one_run(method: str) -> None:
    assert canonical(f"method={method}").digest() == canonical(f"method={method}", "bits.grid=common").digest()


@pytest.mark.parametrize(("method", "bits"), [("quarot", "w4a16"), ("flatquant", "w4a4")])
def test_a_grid_that_concerns_nothing_is_one_run(method: str, bits: str) -> None:
    """Of QuaRot's clip and FlatQuant's K and V, where neither inputs nor K and V are rounded."""
    runs = [spec(f"bits={bits}", f"method={method}", f"bits.grid={grid}").canonical() for grid in ("authors", "common")]
    assert runs[0].digest() == runs[1].digest()
    assert runs[0].method == runs[1].method and runs[0].method.authors is None  # what tables ask


def test_what_is_asked_for_stays() -> None:
    bits = canonical("method=quarot", "bits.activations.clip_ratio=0.8", "bits.activations.symmetric=false").bits
    assert (bits.activations.clip_ratio, bits.activations.symmetric) == (0.8, False)


def test_the_canonical_form_is_its_own() -> None:
    for method in ("smoothquant", "quarot", "dllmquant_plus_plus"):
        once = spec("bits=w4a4_softmax_v", f"method={method}").canonical()
        assert once.canonical() == once


def test_16_bits_have_no_grid() -> None:
    assert spec("bits=w4a16", "method=smoothquant").canonical().bits.activations.symmetric


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("bits.grid=mine", "bits.grid: got 'mine', allowed: authors, common"),
        ("method.authors.activation_clip=1.5", "method.authors.activation_clip: got 1.5"),
        ("bits.attention.kv_clip_ratio=0", "bits.attention.kv_clip_ratio: got 0"),
    ],
)
def test_refusals(override: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        spec("method=quarot", override)
    assert str(error.value).startswith(allowed) and "\n" not in str(error.value)
