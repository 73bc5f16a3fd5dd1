"""Closed-form channel scales and Fisher weights in STaR-Quant: least, exact, and where they belong."""

from __future__ import annotations

import pytest
import torch

from starquant.errors import ConfigError
from starquant.methods.fitted import block_part
from starquant.methods.star_quant.channel_scales import DAMPING, closed_form_scale
from starquant.methods.star_quant.fisher import fisher_part, output_weights, token_weights
from starquant.models.roles import Role, Site
from tests.support.methods import by_hand, method_named
from tests.support.models import ARCHITECTURES, fresh, logits
from tests.support.states import states_of

QUICK = (
    *("bits=w4a4", "method.transform.steps=2", "method.transform.rows=16", "method.tac.enabled=false"),
    *("method.residual_rotation=hadamard", "method.transform.channel_scales=false", "method.transform.balance=false"),
    "method.fisher.hessian=false",
)
SCALED = ("method.residual_rotation=none", "method.transform.channel_scales=true")
FISHER = tuple(f"method.fisher.{name}=true" for name in ("outputs", "rows", "hessian"))


def test_scales_are_the_least_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    second_D, weight_D = torch.rand(2, 50, generator=generator, dtype=torch.float64).exp()
    scale_D = closed_form_scale(second_D, weight_D)
    assert float(scale_D.log().mean().abs()) < 1e-12
    damped = [x + DAMPING * x.mean() for x in (second_D, weight_D)]

    def cost(c_D: torch.Tensor) -> float:
        return float((c_D.square() * damped[0]).sum() * (damped[1] / c_D.square()).sum())

    least = cost(1 / scale_D)
    for _ in range(200):
        other = scale_D * (0.1 * torch.randn(50, generator=generator, dtype=torch.float64)).exp()
        assert cost(1 / other) > least
    assert cost(torch.ones_like(scale_D)) > least


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_but_rounding_changes(architecture: str) -> None:
    method, bits = method_named("star_quant_plus", *QUICK, *SCALED, *FISHER[:2], "method.weights.name=rtn")
    model = fresh(architecture)
    states = states_of(model)
    learned, before = method.fit(model, bits, states), logits(model, states.batches[0].ids_BL)
    scales = learned.get(block_part(1))
    assert {name for name in scales if name.endswith(".scale")} == {
        f"{site.value}.scale" for site in (Site.QKV, Site.GATE_UP, Site.DOWN)
    }
    assert all(float(scales[name].log().std()) > 0.01 for name in scales if name.endswith(".scale"))
    by_hand(method, model, learned)
    after = logits(model, states.batches[0].ids_BL)
    assert float((after - before).norm() / before.norm()) < 1e-4


@pytest.mark.parametrize("settings", [(), ("method.residual_rotation=none", "method.transform.fit=fixed")])
def test_scales_need_native_channels_and_a_matrix_behind_them(settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^method\.transform\.channel_scales: got true, but"):
        method_named("star_quant_plus", *QUICK, "method.transform.channel_scales=true", *settings)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (("method.fisher.outputs=true", "method.transform.structure=shared"), "outputs"),
        (("method.fisher.rows=true", "method.transform.fit=fixed"), "rows"),
        (("method.fisher.hessian=true", "method.weights.name=rtn"), "hessian"),
    ],
)
def test_weights_that_nothing_would_read_are_refused(settings: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.fisher\.{key}: got true, but .*; allowed: false$"):
        method_named("star_quant_plus", *QUICK, *settings)


def test_token_weights_have_mean_one_and_a_floor() -> None:
    sites = fresh("llada_gqa").block_sites(fresh("llada_gqa").trunk().blocks[0])
    squares = torch.tensor([[0.0, 1.0, 3.0, 100.0]])
    visible = torch.tensor([[True, True, True, False]])
    weights = token_weights(sites, {"qkv_input.tokens.00000": squares}, [visible])
    assert list(weights) == [Site.QKV]
    (weight_BL,) = weights[Site.QKV]
    assert float(weight_BL[visible].square().mean()) == pytest.approx(1.0)
    assert float(weight_BL[0, 0]) == pytest.approx((0.01 / 1.01) ** 0.5)


def test_output_weights_follow_what_rotations_and_scales_do() -> None:
    model = fresh("llada_gqa")
    sites = model.block_sites(model.trunk().blocks[0])
    fisher = {f"{r.value}.outputs": torch.rand(linear.out_features) + 0.1 for r, linear in sites.linears.items()}
    rotated, _ = method_named("star_quant_plus", *QUICK)
    weights = output_weights(sites, fisher, {}, rotated.options)
    assert float(weights[Role.OUT].std()) < 1e-6 < float(weights[Role.Q].std())  # the residual stream is rotated
    heads = weights[Role.V].unflatten(0, (sites.attention.n_kv_heads, -1))
    assert float(heads.std(1).max()) < 1e-6 < float(heads[:, 0].std())
    native, _ = method_named("star_quant_plus", *QUICK, *SCALED)
    scale_D = torch.full((sites.width(Site.DOWN),), 2.0)
    weights = output_weights(sites, fisher, {"down_input.scale": scale_D}, native.options)
    assert float(weights[Role.OUT].std()) > 0.01
    up_O, gate_O = (weights[role].square() * 1.01 - 0.01 for role in (Role.UP, Role.GATE))
    raw = [fisher[f"{role.value}.outputs"].double() for role in (Role.UP, Role.GATE)]
    assert torch.allclose(up_O / gate_O, 4 * raw[0] / raw[1])  # of y / 2, the gradient is twice as large


def test_fisher_weights_are_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method, bits = method_named("star_quant_plus", *QUICK, *FISHER)
    model = fresh("llada_gqa")
    fitted = method.fit(model, bits, states_of(model))
    assert fisher_part(0) in fitted and fisher_part(1) in fitted
    monkeypatch.setattr("starquant.methods.star_quant.fisher.fisher_weights", None)  # a second pass would fail
    again = method.fit(model, bits, states_of(model), into=fitted)
    assert again is fitted
