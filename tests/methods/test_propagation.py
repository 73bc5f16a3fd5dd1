"""Weights that make up for what has become of their inputs (QEP): the closed form, and where its moments come from.

Shapes: O outputs, D width, N tokens.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import starquant.methods.solvers as solvers
from starquant.calibration.batches import CalibrationStates
from starquant.calibration.walk import BlockVisit
from starquant.errors import ConfigError
from starquant.methods.fitted import block_part
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Site
from starquant.numerics import QuantFormat
from starquant.numerics.gptq import factorize, made_up
from starquant.numerics.moments import SecondMoment
from tests.support.methods import method_named
from tests.support.models import fresh_tiny
from tests.support.states import tiny_states

Seen = dict[tuple[int, Site], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def few(tiny: MaskedDiffusionModel, tiny_tokenizer: object) -> CalibrationStates:
    """Some states, fed through quantized blocks."""
    return dataclasses.replace(tiny_states(tiny, tiny_tokenizer, "train", 16), inputs="quantized")


@pytest.mark.parametrize("act_order", [False, True])
def test_at_share_1_it_is_the_ridge_regression_of_exact_outputs_on_rounded_inputs(act_order: bool) -> None:
    """[X; sqrt(d) I] and [Q; sqrt(d) I] stacked, solved by QR; half the share goes half the way."""
    generator = torch.Generator().manual_seed(0)
    x_ND, w_OD = (torch.randn(n, 24, generator=generator, dtype=torch.float64) for n in (200, 10))
    x_ND *= torch.linspace(0.3, 3.0, 24, dtype=torch.float64)
    q_ND = x_ND + 0.2 * torch.randn(200, 24, generator=generator, dtype=torch.float64)
    second_DD, moved_DD = q_ND.T @ q_ND, (x_ND - q_ND).T @ q_ND
    factor = factorize(second_DD, percdamp=0.01, act_order=act_order)
    ridge = (0.01 * second_DD.diagonal().mean()).sqrt() * torch.eye(24, dtype=torch.float64)
    expected_DO = torch.linalg.lstsq(torch.cat((q_ND, ridge)), torch.cat((x_ND @ w_OD.T, ridge @ w_OD.T))).solution
    torch.testing.assert_close(made_up(w_OD, factor, moved_DD, 1.0), expected_DO.T, rtol=1e-9, atol=1e-9)
    half_OD = made_up(w_OD, factor, moved_DD, 0.5)
    torch.testing.assert_close(half_OD, (w_OD + expected_DO.T) / 2, rtol=1e-9, atol=1e-9)


def test_second_moments_of_rows_beside_others_are_weighted_sums_of_outer_products() -> None:
    """Against the sum written out, in two chunks."""
    generator = torch.Generator().manual_seed(0)
    x_ND, y_ND = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    weight_N = torch.rand(9, generator=generator, dtype=torch.float64)
    sums = SecondMoment()
    for rows in (slice(0, 4), slice(4, 9)):
        sums.update(x_ND[rows], weight_N[rows], y_ND[rows])
    expected = sum(w**2 * torch.outer(y, x) for w, x, y in zip(weight_N, x_ND, y_ND, strict=True))
    torch.testing.assert_close(sums.total, expected)
    assert sums.count == 9


def fitted_moments(
    monkeypatch: pytest.MonkeyPatch, name: str, states: CalibrationStates, *overrides: str
) -> tuple[dict[str, Tensor], Seen]:
    """What a method fits of the embedded model's blocks, and the moments that it solved them on."""
    seen: Seen = {}

    def listening(visit: BlockVisit, site: Site, grid: QuantFormat, weighted: bool = False) -> tuple[Tensor, Tensor]:
        seen[visit.index, site] = original(visit, site, grid, weighted)
        return seen[visit.index, site]

    original = solvers.moments_of_moved_inputs
    monkeypatch.setattr(solvers, "moments_of_moved_inputs", listening)
    method, bits = method_named(name, *overrides)
    model = fresh_tiny()
    fitted = method.fit(model, bits, states)
    parts = [block_part(index) for index in range(len(model.trunk().blocks))]
    return {f"{part}/{key}": x for part in parts for key, x in fitted.get(part).items()}, seen


@pytest.mark.parametrize("name", ["gptq", "smoothquant", "quarot", "star_quant", "star_quant_plus", "flatquant"])
def test_exact_and_quantized_inputs_are_compared_in_one_basis(
    name: str, few: CalibrationStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 8 bits inputs have hardly moved, at any site behind any rewriting; gates, which drop what they close, off."""
    quick = {"star_quant": ["method.transform.steps=2", "method.sgat.enabled=false"]}
    quick["star_quant_plus"] = quick["star_quant"]
    quick["flatquant"] = ["method.epochs=1"]
    _, seen = fitted_moments(
        monkeypatch,
        name,
        few,
        "bits=w8a8",
        "method.weights.name=gptq",
        "method.weights.propagation=1",
        "calibration.inputs=quantized",
        *quick.get(name, []),
    )
    assert set(seen) == {(block, site) for block in range(4) for site in Site}
    for (block, site), (second_DD, moved_DD) in seen.items():
        assert 0 < float(moved_DD.norm()) < 0.05 * float(second_DD.norm()), (block, site)


def test_where_nothing_has_been_rounded_yet_nothing_is_made_up_for(
    few: CalibrationStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights only: the first site's codes are GPTQ's own, later sites' are not."""
    settings = ("bits=w4a16", "calibration.inputs=quantized", "method.weights.propagation=1")
    made, seen = fitted_moments(monkeypatch, "gptq", few, *settings)
    plain, _ = fitted_moments(monkeypatch, "gptq", few, *settings[:2])
    assert not bool(seen[0, Site.QKV][1].any())
    same = {name for name, codes in plain.items() if name.endswith("codes") and made[name].equal(codes)}
    assert same == {f"{block_part(0)}/{role}.codes" for role in ("q_proj", "k_proj", "v_proj")}


def test_states_that_saw_no_rounding_are_refused(tiny: MaskedDiffusionModel, tiny_tokenizer: object) -> None:
    """From Python as from a configuration."""
    method, bits = method_named("gptq", "calibration.inputs=quantized", "method.weights.propagation=1")
    states = tiny_states(tiny, tiny_tokenizer, "train", 2)
    with pytest.raises(ConfigError, match=r"propagation.*allowed: quantized, quantized_weights"):
        method.fit(fresh_tiny(), bits, states)
    with pytest.raises(ConfigError, match=r"calibration\.inputs: got 'full_precision'.*propagation"):
        method_named("gptq", "method.weights.propagation=1")
    with pytest.raises(ConfigError, match=r"method\.weights\.propagation: got 1 for name=rtn"):
        method_named("rtn", "calibration.inputs=quantized", "method.weights.propagation=1")
