"""AWQ's searches against output errors computed from real activations, and its gain on held-out states.

Shape suffixes: N tokens, D width of a site.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.methods.fitted import Fitted, block_part
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Role, Site
from tests.support.formulas import GRID, asymmetric, candidate, lost, rounded
from tests.support.methods import dead_channel_fit, method_named
from tests.support.models import fresh, fresh_tiny, logits, trajectory
from tests.support.states import inputs_of, site_inputs, states_of, tiny_states

CLIPS = 10  # ratios 1, 0.95, ..., 0.55


@pytest.fixture(scope="module")
def training(tiny: MaskedDiffusionModel, tiny_tokenizer: object) -> CalibrationStates:
    """States to calibrate the embedded model on."""
    return tiny_states(tiny, tiny_tokenizer, "train", 64)


@pytest.mark.parametrize(
    ("architecture", "group", "symmetric"),
    [
        *(("llada_mha", None, False), ("llada_gqa", None, False), ("llada_gqa", 16, False), ("dream_gqa", None, False)),
        *(("llada_mha", None, True), ("llada_gqa", None, True), ("llada_gqa", 16, True), ("dream_gqa", None, True)),
    ],
)
def test_scales_have_the_least_output_error_of_the_grid(architecture: str, group: int | None, symmetric: bool) -> None:
    overrides = [] if group is None else [f"bits.weights.group_size={group}"]
    overrides += ["bits.grid=common"] if symmetric else []
    method, bits = method_named("awq", "method.clip=false", "bits=w4a16", *overrides)
    model = fresh(architecture)
    learned = method.fit(model, bits, states_of(model))
    inputs = inputs_of(model, states_of(model))
    chosen = set()
    for index, block in enumerate(model.trunk().blocks):
        sites, found = model.block_sites(block), learned.get(block_part(index))
        assert set(found) == {f"{site.value}.scale" for site in Site}
        for site in Site:
            x_ND = site_inputs(model, inputs, index, site)
            weights = [linear.weight.detach().double() for linear in sites.readers(site).values()]
            errors = []
            for step in range(GRID):
                scale_D = candidate(sites, site, x_ND, step / GRID)
                errors.append(
                    sum(
                        lost(x_ND, rounded(w * scale_D, group=group, symmetric=symmetric) / scale_D - w)
                        for w in weights
                    )
                )
            scale_D = found[f"{site.value}.scale"].double()
            steps = [
                s for s in range(GRID) if torch.allclose(candidate(sites, site, x_ND, s / GRID), scale_D, rtol=1e-4)
            ]
            assert len(steps) == 1
            assert errors[steps[0]] <= min(errors) * (1 + 1e-4)
            chosen.add(steps[0])
    assert len(chosen) > 2


@pytest.mark.parametrize("grid", ["authors", "common"])
@pytest.mark.parametrize("architecture", ["llada_mha", "dream_gqa"])
def test_clips_have_the_least_output_error_of_every_row(architecture: str, grid: str) -> None:
    method, bits = method_named("awq", "bits=w4a16", f"bits.grid={grid}")
    model = fresh(architecture)
    learned = method.fit(model, bits, states_of(model))
    inputs = inputs_of(model, states_of(model))
    clipped = 0
    for name, info in model.linears().items():
        found = learned.get(block_part(info.block))
        if info.role in (Role.Q, Role.K):
            assert f"{info.role.value}.clip" not in found
            continue
        scale_D = found[f"{info.role.site.value}.scale"].double()
        x_ND, weight = inputs[name] / scale_D, info.module.weight.detach().double() * scale_D
        most = weight.abs().amax(1, keepdim=True)
        errors = []
        for i in range(CLIPS):
            step = most * (1 - i / 20) / 7
            delta = torch.round(weight / step).clamp(-8, 7) * step - weight
            if grid == "authors":
                delta = asymmetric(weight, 4, 1 - i / 20) - weight
            errors.append((x_ND @ delta.T).square().sum(0))
        errors_RO = torch.stack(errors)
        clip_O = found[f"{info.role.value}.clip"][:, 0].double()
        row = ((1 - clip_O) * 20).round().long()
        torch.testing.assert_close(1 - row / 20, clip_O, rtol=0.0, atol=1e-6, check_dtype=False)
        ours = errors_RO.gather(0, row[None])[0]
        assert bool((ours <= errors_RO.amin(0) * (1 + 1e-3) + 1e-12).all())
        assert bool((ours <= errors_RO[0] * (1 + 1e-6)).all())
        clipped += int((clip_O < 1).sum())
    assert clipped > 0


def effective(model: MaskedDiffusionModel, learned: Fitted) -> dict[str, Tensor]:
    """The installed weights in the coordinates of the checkpoint, by name."""
    found = {}
    for name, info in model.linears().items():
        tensors = learned.get(block_part(info.block))
        weight = info.module.weight.detach().double() / tensors[f"{info.role.site.value}.scale"]
        made = {Role.V: Site.OUT, Role.UP: Site.DOWN}.get(info.role)
        found[name] = weight if made is None else weight * tensors[f"{made.value}.scale"][:, None]
    return found


@pytest.mark.parametrize("bits_name", ["w4a16", "w3a3"])
def test_held_out_output_errors_are_smaller_than_those_of_rounding(
    bits_name: str, training: CalibrationStates, held_out: dict[str, Tensor]
) -> None:
    method, bits = method_named("awq", f"bits={bits_name}")
    model, original = fresh_tiny(), fresh_tiny()
    learned = method.fit(model, bits, training)
    method.apply(model, learned, bits)
    ours, theirs, better = 0.0, 0.0, 0
    weights = effective(model, learned)
    for name, info in original.linears().items():
        weight = info.module.weight.detach().double()
        here = lost(held_out[name], weights[name] - weight)
        plain = lost(held_out[name], rounded(weight, bits.weights.bits, symmetric=bits.weights.symmetric) - weight)
        ours, theirs, better = ours + here, theirs + plain, better + (here < plain)
    assert ours < 0.9 * theirs
    assert better > 0.7 * len(weights)


def test_switches() -> None:
    """Without scales and clips AWQ is RTN; GPTQ as the solver takes the place of the clips."""
    states = states_of(fresh("llada_gqa"))
    ids = trajectory(fresh("llada_gqa"))
    plain, model = fresh("llada_gqa"), fresh("llada_gqa")
    rtn, bits = method_named("rtn", "bits=w4a4")
    rtn.apply(plain, rtn.fit(plain, bits), bits)
    method, _ = method_named("awq", "method.scale=false", "method.clip=false")
    method.apply(model, method.fit(model, bits, states), bits)
    assert torch.equal(logits(model, ids), logits(plain, ids))

    keys = {}
    for switch in ("method.scale=false", "method.clip=false", "method.weights.name=gptq"):
        method, _ = method_named("awq", switch)
        keys[switch] = set(method.fit(fresh("llada_gqa"), bits, states).get(block_part(0)))
    scales = {f"{site.value}.scale" for site in Site}
    assert keys["method.clip=false"] == scales
    assert keys["method.scale=false"] == {f"{role.value}.clip" for role in Role if role not in (Role.Q, Role.K)}
    codes = {f"{role.value}.{part}" for role in Role for part in ("codes", "scale")}
    assert keys["method.weights.name=gptq"] == scales | codes


def test_full_precision_weights_are_left_alone() -> None:
    method, bits = method_named("awq", "bits=w4a4", "bits.weights.bits=16")
    model = fresh("llada_gqa")
    assert all(
        not tensors for tensors in map(method.fit(model, bits, states_of(model)).get, ("block_000", "block_001"))
    )


def test_a_dead_channel_is_left_alone_and_noted() -> None:
    """It has no part in the normalisation either: the others are scaled as without it."""
    _, learned = dead_channel_fit("awq", "method.clip=false")
    scale_D = learned.get(block_part(0))["qkv_input.scale"]
    alive = torch.arange(len(scale_D)) != 3
    assert float(scale_D[alive].amax() * scale_D[alive].amin()) == pytest.approx(1.0, rel=1e-5)
