"""What every method must keep on a mixture of experts: a small random LLaDA-MoE, two of four experts a token."""

from __future__ import annotations

import pytest
import torch

from tests.support.methods import FOUR, fitted_once, method_named
from tests.support.models import fresh, logits, trajectory
from tests.support.specs import OPTIONS, spec

MIXTURE = "mixture"


@pytest.fixture(params=[name for name in OPTIONS["method"] if name != "packed"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_at_16_bits_the_function_is_unchanged_along_a_trajectory(name: str) -> None:
    """What was learned for 4 bits is applied without rounding: routers follow what was folded into their norm."""
    method, _ = method_named(name, *FOUR)
    model, reference = fresh(MIXTURE), fresh(MIXTURE)
    method.apply(model, fitted_once(name, MIXTURE), spec("bits=w16a16").bits)
    for ids in trajectory(reference):
        exact, got = logits(reference, ids[None]).double(), logits(model, ids[None]).double()
        assert float((exact - got).norm() / exact.norm()) <= 1e-4


def test_the_manifest_lists_every_experts_linears(name: str) -> None:
    method, bits = method_named(name, *FOUR)
    model, declared = fresh(MIXTURE), fresh(MIXTURE).linears()
    entries = method.apply(model, fitted_once(name, MIXTURE), bits)
    linears = {entry.name: entry for entry in entries if entry.kind == "linear"}
    assert {*linears} == {*declared}
    assert {entry.weight_bits for entry in linears.values()} == {16 if name == "none" else 4}
    assert {entry.role for entry in linears.values()} >= {
        f"expert_{e}.{role}_proj" for e in range(4) for role in ("gate", "up", "down")
    }
    routers = [(entry.name, entry.weight_bits) for entry in entries if entry.kind == "router"]
    assert routers == [(f"model.layers.{index}.mlp.gate", 16) for index in range(2)]
    assert {entry.site for entry in linears.values() if entry.role.endswith("up_proj")} == {
        f"model.layers.{i}.mlp.gate_up_input" for i in range(2)
    }
    assert bool(torch.isfinite(logits(model, trajectory(fresh(MIXTURE)))).all())
