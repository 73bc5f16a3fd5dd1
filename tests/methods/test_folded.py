"""Presets that fold whole: nothing is left to compute between the linears, so that a GGUF holds them."""

from __future__ import annotations

import pytest

from starquant.config.methods import METHODS
from starquant.llama_cpp.foldable import validate_foldable
from tests.support.llama import bits_of_blocks, block_model
from tests.support.specs import OPTIONS, spec
from tests.support.states import partly_masked

SHARED = ("transform.structure=shared", "transform.sites=residual", "transform.steps=2", "transform.rows=32")
OFF = ("out_hadamard=false", "down_hadamard=false", "sgat.enabled=false", "tac.enabled=false")
FOLDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rtn", "gptq", "awq", "smoothquant", "quarot_folded", "plus_folded"), ()),
    "star_quant": (*OFF, *SHARED, "transform.state_clip=false", "weights.name=gptq"),
}


@pytest.mark.parametrize("name", FOLDED)
def test_nothing_stays_online(name: str) -> None:
    options = spec("bits=q4_0", f"method={name}", *(f"method.{word}" for word in FOLDED[name])).method
    assert options.online == ()
    model, bits = block_model("llada_gqa"), bits_of_blocks("q4_0", "llada_gqa")
    method = METHODS.build(options)
    fitted = method.fit(model, bits, partly_masked(model) if options.needs_calibration else None)
    method.apply(model, fitted, bits, packed=True)
    validate_foldable(model)


def test_what_stays_online_is_named() -> None:
    named = {name: spec(f"method={name}").method.online[:1] for name in OPTIONS["method"]}
    assert {name: online[0] for name, online in named.items() if online} == {
        **dict.fromkeys(("quarot", "quarot_rtn", "dllmquant_plus_plus"), "out_hadamard"),
        **dict.fromkeys(("flatquant", "freeact"), "algorithm"),
        **{name: "transform.fit" for name in OPTIONS["method"] if name.startswith("star_quant")},
    }
