"""A fit that is interrupted goes on from its last finished block and ends with the same tensors."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starquant.methods import solvers
from starquant.methods.fitted import Fitted
from tests.support.methods import method_named
from tests.support.models import fresh
from tests.support.states import states_of

LINEARS = 7
STAR = ("star_quant", "bits=w4a4", "method.transform.steps=2")


@functools.cache
def whole_star() -> Fitted:
    """A fit that nothing interrupts."""
    method, bits = method_named(*STAR)
    model = fresh("dream_gqa")
    return method.fit(model, bits, states_of(model))


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        *(("gptq", "full_precision"), ("quarot", "quantized"), ("dllmquant_plus_plus", "full_precision")),
        ("gptq", "quantized, propagated"),
        pytest.param("gptq", "quantized", marks=pytest.mark.slow),
        pytest.param("quarot", "full_precision", marks=pytest.mark.slow),
        pytest.param("dllmquant_plus_plus", "quantized", marks=pytest.mark.slow),
    ],
)
def test_interrupted_fit_goes_on(name: str, inputs: str, tmp_path: Path, monkeypatch) -> None:
    inputs, _, propagated = inputs.partition(", ")
    more = ("method.weights.propagation=0.5", "calibration.inputs=quantized") if propagated else ()
    method, bits = method_named(name, "bits=w4a4", "bits.attention.v=4", *more)
    states = replace(states_of(fresh("dream_gqa")), inputs=inputs)
    whole = method.fit(fresh("dream_gqa"), bits, states)
    solved = []
    exact = solvers.gptq

    def counted(*args: object, **options: object) -> object:
        if len(solved) == LINEARS + 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        solved.append(1)
        return exact(*args, **options)

    monkeypatch.setattr(solvers, "gptq", counted)
    with pytest.raises(KeyboardInterrupt):
        method.fit(fresh("dream_gqa"), bits, states, Fitted.resume(tmp_path))
    assert len(solved) == LINEARS + 3
    model = fresh("dream_gqa")
    again = method.fit(model, bits, states, Fitted.resume(tmp_path))
    assert len(solved) == LINEARS + 3 + 2 * LINEARS  # the first block is not solved again
    assert again.parts() == whole.parts()
    for part in whole.parts():
        ours, theirs = again.get(part), whole.get(part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("damage", ["part", "gone", "list"])
def test_what_was_edited_is_fitted_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second block of an interrupted fit, or the list of its parts."""
    method, bits = method_named(*STAR)
    states = states_of(fresh("dream_gqa"))
    whole = whole_star()
    folder = tmp_path / "fit"
    method.fit(fresh("dream_gqa"), bits, states, Fitted.resume(folder))
    part, listed = folder / "block_001.safetensors", folder / "unfinished.json"
    if damage == "part":
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(content)
    elif damage == "gone":
        part.unlink()
    else:
        listed.write_text(listed.read_text().replace('"block": 1', '"block": 2', 1))
    resumed = Fitted.resume(folder)
    assert resumed.parts() == ([] if damage == "list" else ["block_000", "ends"])
    assert (listed if damage == "list" else part).name in caplog.text
    method.fit(fresh("dream_gqa"), bits, states, resumed)
    again = Fitted.resume(folder)
    assert (again.parts(), again.report, again.notes) == (whole.parts(), whole.report, whole.notes)
    for name in whole.parts():
        ours, theirs = again.get(name), whole.get(name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
