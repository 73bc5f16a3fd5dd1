"""What every method must keep on block diffusion and on mixtures of experts: small random models of these families."""

from __future__ import annotations

import pytest
import torch

from starquant.config.methods import METHODS
from tests.support.methods import FOUR, fitted_once, method_named
from tests.support.models import fresh, logits, trajectory
from tests.support.specs import spec

#: Every algorithm and our variant on the model that has everything, the others on one each.
CASES = [("llada2", name) for name in (*METHODS, "star_quant_plus") if name not in ("packed", "gguf")]
CASES += [("mixture", "quarot"), ("mixture", "awq"), ("sdar", "flatquant"), ("sdar", "dllmquant_plus_plus")]
#: Blocks that are mixtures.
MIXTURES = {"llada2": [1], "mixture": [0, 1], "sdar": []}


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_at_16_bits_the_function_is_unchanged_along_a_trajectory(architecture: str, name: str) -> None:
    """What was learned for 4 bits is applied without rounding: routers follow what was folded into their norm."""
    method, _ = method_named(name, *FOUR)
    model, reference = fresh(architecture), fresh(architecture)
    method.apply(model, fitted_once(name, architecture), spec("bits=w16a16").bits)
    for ids in trajectory(reference):
        exact, got = logits(reference, ids[None]).double(), logits(model, ids[None]).double()
        assert float((exact - got).norm() / exact.norm()) <= 1e-4


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_the_manifest_lists_every_linear(architecture: str, name: str) -> None:
    method, bits = method_named(name, *FOUR)
    model, declared = fresh(architecture), fresh(architecture).linears()
    entries = method.apply(model, fitted_once(name, architecture), bits)
    linears = {entry.name: entry for entry in entries if entry.kind == "linear"}
    assert {*linears} == {*declared}
    assert {entry.weight_bits for entry in linears.values()} == {16 if name == "none" else 4}
    assert bool(torch.isfinite(logits(model, trajectory(fresh(architecture)))).all())
    mixtures = MIXTURES[architecture]
    routers = [(entry.name, entry.weight_bits) for entry in entries if entry.kind == "router"]
    assert routers == [(f"model.layers.{index}.mlp.gate", 16) for index in mixtures]
    roles = {entry.role for entry in linears.values()}
    experts = {f"expert_{e}.{role}_proj" for e in range(4) for role in ("gate", "up", "down")}
    assert (experts <= roles) == bool(mixtures)
    shared = {entry.site for entry in linears.values() if entry.role.endswith("up_proj")}
    assert shared == {f"model.layers.{index}.mlp.gate_up_input" for index in (0, 1)}, "one transform a layer"
