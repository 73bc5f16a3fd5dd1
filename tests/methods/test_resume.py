"""A fit that is interrupted goes on from its last finished block and ends with the same tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import starquant.numerics
from starquant.methods.fitted import Fitted
from tests.support.methods import method_named
from tests.support.models import fresh
from tests.support.states import states_of

LINEARS = 7


@pytest.mark.parametrize("inputs", ["full_precision", "quantized"])
@pytest.mark.parametrize("name", ["gptq", "quarot", "dllmquant_plus_plus"])
def test_interrupted_fit_goes_on(name: str, inputs: str, tmp_path: Path, monkeypatch) -> None:
    method, bits = method_named(name, "bits=w4a4", "bits.attention.v=4")
    states = replace(states_of(fresh("dream_gqa")), inputs=inputs)
    whole = method.fit(fresh("dream_gqa"), bits, states)
    solved = []
    exact = starquant.numerics.gptq

    def counted(*args: object, **options: object) -> object:
        if len(solved) == LINEARS + 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        solved.append(1)
        return exact(*args, **options)

    monkeypatch.setattr(starquant.numerics, "gptq", counted)
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
