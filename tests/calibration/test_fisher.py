"""Fisher weights: against one backward pass through the whole model, and what they do to statistics and rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from starquant.calibration.fisher import SEED, fisher_weights
from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import walk
from starquant.diffusion import MaskPredictor
from starquant.errors import DataError
from starquant.models.roles import Site
from starquant.numerics import PerChannel, PerToken, QuantFormat, quantize
from tests.support.models import ARCHITECTURES, fresh
from tests.support.states import inputs_of, partly_masked


@pytest.mark.parametrize("at_once", [3, 1000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_those_of_one_backward_pass(
    architecture: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaskPredictor, "positions_at_once", lambda self: at_once)
    model = fresh(architecture).double()
    states = partly_masked(model)
    weights = fisher_weights(model, states)
    generator = torch.Generator().manual_seed(SEED)
    infos, outputs = model.linears(), {}
    for name, info in infos.items():
        info.module.register_forward_hook(lambda _, inputs, out, name=name: outputs.__setitem__(name, out))
    total: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(states.batches):
        with torch.enable_grad():
            logits_BLV = model(batch.ids_BL, attention_mask=batch.visible_BL).logits
            rows, columns = ((batch.ids_BL == states.mask_id) & batch.visible_BL).nonzero(as_tuple=True)
            first_N = batch.visible_BL.int().argmax(1)[rows]  # reads its own hidden state
            logits_NV = logits_BLV[rows, torch.maximum(columns + model.logit_offset, first_N)]
            probability_NV = logits_NV.detach().float().softmax(-1)
            uniform_N1 = torch.rand(len(rows), generator=generator)[:, None]
            label_N1 = torch.searchsorted(probability_NV.cumsum(-1), uniform_N1).clamp_max(logits_NV.shape[1] - 1)
            loss = torch.nn.functional.cross_entropy(logits_NV, label_N1[:, 0], reduction="sum")
            gradients = torch.autograd.grad(loss, list(outputs.values()))
        tokens: dict[tuple[int, Site], torch.Tensor] = {}
        for name, gradient in zip(outputs, gradients, strict=True):
            key = infos[name].block, infos[name].role.site
            tokens[key] = tokens.get(key, 0.0) + gradient.square().sum(-1)
            total[name] = total.get(name, 0.0) + gradient.square().sum((0, 1))
        for (block, site), expected in tokens.items():
            assert torch.allclose(weights[block].tokens[site][number].double(), expected, rtol=1e-4, atol=1e-9)
    for name, expected in total.items():
        found = weights[infos[name].block].outputs[infos[name].role]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_states_without_a_masked_position_are_refused() -> None:
    model = fresh("llada_gqa")
    states = partly_masked(model)
    clean = [dataclasses.replace(batch, ids_BL=torch.zeros_like(batch.ids_BL)) for batch in states.batches]
    with pytest.raises(DataError, match=r"^calibration\.states: no position is masked"):
        fisher_weights(model, dataclasses.replace(states, batches=clean))


def test_a_visit_weighs_the_tokens_of_each_site() -> None:
    model = fresh("llada_gqa")
    states = partly_masked(model)
    weights = [torch.rand(batch.ids_BL.shape) for batch in states.batches]
    inputs = inputs_of(model, states)
    for visit in walk(model, states):
        visit.token_weights = {Site.QKV: weights}
        collected = visit.collect(Collect(moments=False, second_moment="pooled", weighted=True), (Site.QKV, Site.DOWN))
        for site, expected_N in ((Site.QKV, weights), (Site.DOWN, [batch.weight_BL for batch in states.batches])):
            name = next(name for name, info in visit.linears.items() if info.role.site is site)
            weight_N = torch.cat([w[b.visible_BL] for w, b in zip(expected_N, states.batches, strict=True)]).double()
            x_ND = inputs[name] * weight_N[:, None]
            assert torch.allclose(collected[site].second_moment().total, x_ND.T @ x_ND, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weighted_rows_are_rounded_to_the_same_codes(symmetric: bool) -> None:
    """Powers of two, so that nothing but the scale moves."""
    x_ND, weight_N1 = torch.randn(6, 40), 2.0 ** torch.arange(-3, 3)[:, None]
    for granularity in (PerToken(), PerChannel()):
        fmt = QuantFormat(4, symmetric, granularity)
        assert torch.equal(quantize(x_ND, fmt).codes, quantize(weight_N1 * x_ND, fmt).codes)
