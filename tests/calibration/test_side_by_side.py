"""The exact block beside a quantized copy: which hidden states either is fed, what is handed over, what is left behind.

References are plain forward passes with hooks of our own.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.calibration.walk import BlockVisit, Pair, walk
from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import site_input
from starquant.models.roles import Role, Site
from starquant.quantized.install import install, quantize_block, round_to_nearest
from tests.support.models import ARCHITECTURES, fresh, hooks_of
from tests.support.specs import FOUR_BITS
from tests.support.states import partly_masked


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> MaskedDiffusionModel:
    return fresh(request.param)


def given(model: MaskedDiffusionModel, states: CalibrationStates, site: Site) -> list[list[Tensor]]:
    """What plain forward passes put in front of a site: [block][batch]."""
    found: list[list[Tensor]] = []
    handles = []
    for block in model.trunk().blocks:
        seen: list[Tensor] = []
        found.append(seen)
        module = model.block_sites(block).inputs[site]
        handles.append(
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(site_input(args).clone()))
        )
    with torch.no_grad():
        for batch in states.batches:
            model(batch.ids_BL, batch.visible_BL)
    for handle in handles:
        handle.remove()
    return found


def pairs_of(visit: BlockVisit, site: Site) -> list[Pair]:
    """Every batch of a comparison with a copy quantized to four bits."""
    twin, found = copy.deepcopy(visit.block), []
    quantize_block(visit.model, twin, visit.index, FOUR_BITS, round_to_nearest)
    visit.side_by_side(twin, site, found.append)
    return found


@pytest.mark.parametrize("site", [Site.OUT, Site.DOWN])
def test_fed_quantized_the_exact_side_is_the_plain_model_and_the_other_the_quantized_one(
    model: MaskedDiffusionModel, site: Site
) -> None:
    states = partly_masked(model, inputs="quantized")
    whole = copy.deepcopy(model)
    install(whole, FOUR_BITS)
    exact, quantized = given(model, states, site), given(whole, states, site)
    for visit in walk(model, states):
        visit.keep_exact()
        for i, pair in enumerate(pairs_of(visit, site)):
            assert torch.equal(pair.exact_BLD, exact[visit.index][i])
            assert torch.equal(pair.quantized_BLD, quantized[visit.index][i])
            assert not torch.equal(pair.exact_BLD, pair.quantized_BLD)
        quantize_block(model, visit.block, visit.index, FOUR_BITS, round_to_nearest)


def test_fed_full_precision_both_sides_read_the_same(model: MaskedDiffusionModel) -> None:
    """A copy that was not quantized then gives the same, in every block, whatever became of the blocks before it."""
    states = partly_masked(model)
    exact = given(model, states, Site.OUT)
    for visit in walk(model, states):
        visit.keep_exact()
        found: list[Pair] = []
        visit.side_by_side(copy.deepcopy(visit.block), Site.OUT, found.append)
        for pair, wanted in zip(found, exact[visit.index], strict=True):
            assert torch.equal(pair.exact_BLD, wanted)
            assert torch.equal(pair.quantized_BLD, wanted)
        visit.observe()
        quantize_block(model, visit.block, visit.index, FOUR_BITS, round_to_nearest)


def test_pairs_come_with_their_batch_tokens_and_states(model: MaskedDiffusionModel) -> None:
    states = partly_masked(model, inputs="quantized")
    for visit in walk(model, states):
        visit.keep_exact()
        pairs = pairs_of(visit, Site.OUT)
        assert len(pairs) == len(states.batches)
        for pair, batch in zip(pairs, states.batches, strict=True):
            assert torch.equal(pair.visible_BL, batch.visible_BL)
            assert torch.equal(pair.context.masked_BL, batch.ids_BL == model.mask_token_id)


def test_the_exact_block_is_the_one_that_was_kept(model: MaskedDiffusionModel) -> None:
    """Changes before it was kept count (a rotated basis), changes behind it do not."""
    states = partly_masked(model, inputs="quantized")
    exact = given(model, states, Site.OUT)
    for visit in walk(model, states):
        with torch.no_grad():
            visit.sites.linears[Role.V].weight.mul_(2.0)
            visit.sites.linears[Role.OUT].weight.mul_(0.5)
            if visit.sites.linears[Role.V].bias is not None:
                visit.sites.linears[Role.V].bias.mul_(2.0)
        visit.keep_exact()
        with torch.no_grad():
            visit.sites.linears[Role.OUT].weight.zero_()
            visit.sites.linears[Role.V].weight.zero_()
        for pair, wanted in zip(pairs_of(visit, Site.OUT), exact[visit.index], strict=True):
            torch.testing.assert_close(pair.exact_BLD, 2.0 * wanted, rtol=1e-4, atol=1e-5)


def test_without_an_exact_block_there_is_nothing_to_compare_with() -> None:
    model = fresh("llada_gqa")
    for visit in walk(model, partly_masked(model)):
        assert visit.exact is None
        with pytest.raises(AssertionError, match="keep_exact comes first"):
            visit.side_by_side(copy.deepcopy(visit.block), Site.OUT, lambda pair: None)


def test_no_hook_stays_even_if_the_receiver_fails() -> None:
    model = fresh("llada_gqa")

    def fail(pair: Pair) -> None:
        raise KeyboardInterrupt

    for visit in walk(model, partly_masked(model)):
        visit.keep_exact()
        assert visit.exact is not None
        twin = copy.deepcopy(visit.block)
        visit.side_by_side(twin, Site.OUT, lambda pair: None)
        assert not hooks_of(twin)
        with pytest.raises(KeyboardInterrupt):
            visit.side_by_side(twin, Site.OUT, fail)
        assert not hooks_of(twin)
        assert not hooks_of(visit.exact)
        assert not hooks_of(visit.block)


@pytest.mark.parametrize("inputs", ["full_precision", "quantized"])
def test_comparing_changes_neither_the_walk_nor_the_model(inputs: str) -> None:
    model = fresh("llada_gqa")
    states, before = partly_masked(model, inputs=inputs), copy.deepcopy(model.state_dict())
    streams = []
    for compare in (False, True):
        seen, visits = [], []
        for visit in walk(model, states):
            visits.append(visit)
            if compare:
                visit.keep_exact()
                pairs_of(visit, Site.OUT)
            handle = visit.block.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(site_input(args).clone())
            )
            visit.observe()
            handle.remove()
            quantize_block(model, visit.block, visit.index, FOUR_BITS, round_to_nearest)
        assert all(visit.exact is None for visit in visits)  # no block is held longer than needed
        streams.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*streams, strict=True))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
