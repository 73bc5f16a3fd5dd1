"""Streamed statistics against a naive capture of all activations by plain hooks on the full-precision model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates, StateBatch
from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.calibration.walk import walk
from starquant.errors import DataError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.context import Context
from starquant.models.roles import Site
from starquant.numerics import BIDIRECTIONAL, TokenState
from tests.support.models import ARCHITECTURES, fresh
from tests.support.states import partly_masked

BINS = 4
CELLS = [(state, k) for state in (None, *BIDIRECTIONAL) for k in (None, *range(BINS))]


def of_states(masked_BL: Tensor) -> Context:
    """The context of a pass in which these tokens are masked."""
    return Context((masked_BL, masked_BL), None, masked_BL)


@dataclass(frozen=True)
class Naive:
    """Everything that the linears behind one site read at visible tokens, token by token."""

    x_ND: Tensor
    masked: list[bool]
    bins: list[int]
    weights: list[float]

    def chosen(self, state: TokenState | None, k: int | None) -> list[int]:
        return [
            n
            for n in range(len(self.masked))
            if (state is None or self.masked[n] == (state is TokenState.MASKED)) and k in (None, self.bins[n])
        ]


def capture(model: MaskedDiffusionModel, states: CalibrationStates) -> dict[tuple[int, Site], Naive]:
    """Run the whole model batch by batch; a pre-hook on the first linear behind each site keeps its input."""
    inputs: dict[tuple[int, Site], list[Tensor]] = {}
    handles = []
    for index, block in enumerate(model.trunk().blocks):
        for site in Site:
            kept = inputs.setdefault((index, site), [])
            linear = next(iter(model.block_sites(block).readers(site).values()))
            handles.append(linear.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0])))
    with torch.no_grad():
        for batch in states.batches:
            model(batch.ids_BL, batch.visible_BL)
    for handle in handles:
        handle.remove()
    return {key: _flatten(kept, model, states) for key, kept in inputs.items()}


def _flatten(kept: list[Tensor], model: MaskedDiffusionModel, states: CalibrationStates) -> Naive:
    rows, masked, bins, weights = [], [], [], []
    for x_BLD, batch in zip(kept, states.batches, strict=True):
        for b, visible_L in enumerate(batch.visible_BL.tolist()):
            ids = [int(t) for t, v in zip(batch.ids_BL[b], visible_L, strict=True) if v]
            ratio = ids.count(model.mask_token_id) / len(ids)
            k = next(k for k in range(BINS) if ratio <= (k + 1) / BINS)
            for i, visible in enumerate(visible_L):
                if visible:
                    rows.append(x_BLD[b, i])
                    masked.append(int(batch.ids_BL[b, i]) == model.mask_token_id)
                    bins.append(k)
                    weights.append(1.0 if batch.weight_BL is None else float(batch.weight_BL[b, i]))
    return Naive(torch.stack(rows).double(), masked, bins, weights)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> MaskedDiffusionModel:
    return fresh(request.param)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7 * float(want.abs().max()))


def test_moments_of_every_token_state_and_bin(model: MaskedDiffusionModel) -> None:
    states = partly_masked(model, BINS)
    naive = capture(model, states)
    for visit in walk(model, states):
        for site, found in visit.collect(Collect()).items():
            everything = naive[visit.index, site]
            for state, k in CELLS:
                chosen = everything.chosen(state, k)
                if not chosen:
                    with pytest.raises(DataError):
                        found.moments(state, k)
                    continue
                x_ND = everything.x_ND[chosen]
                got = found.moments(state, k)
                assert got.count == len(chosen)
                close(got.absmax, x_ND.abs().amax(0))
                close(got.mean, x_ND.sum(0) / len(chosen))
                close(got.variance, (x_ND - x_ND.mean(0)).square().mean(0))
                close(got.mean_abs, x_ND.abs().mean(0))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kept", ["pooled", "state", "bin"])
def test_second_moments(model: MaskedDiffusionModel, kept: str, weighted: bool) -> None:
    """Sum of (w x)(w x)^T over tokens, divided by their number; w is CGQ's, or one."""
    states = partly_masked(model, BINS)
    naive = capture(model, states)
    cells = {"pooled": [(None, None)], "state": [(s, None) for s in (None, *BIDIRECTIONAL)], "bin": CELLS}[kept]
    plan = Collect(moments=False, second_moment=kept, weighted=weighted)
    for visit in walk(model, states):
        for site, found in visit.collect(plan, (Site.QKV, Site.OUT)).items():
            everything = naive[visit.index, site]
            for state, k in cells:
                chosen = everything.chosen(state, k)
                if not chosen:
                    continue
                total = torch.zeros(everything.x_ND.shape[1], everything.x_ND.shape[1], dtype=torch.float64)
                for n in chosen:
                    x_D = everything.x_ND[n] * (everything.weights[n] if weighted else 1.0)
                    total += torch.outer(x_D, x_D)
                got = found.second_moment(state, k)
                assert got.count == len(chosen)
                close(got.mean, total / len(chosen))


def test_states_without_weights_are_weighted_by_one(model: MaskedDiffusionModel) -> None:
    states = partly_masked(model)
    bare = replace(states, batches=[replace(batch, weight_BL=None) for batch in states.batches])
    found = {}
    for name, given, weighted in (("unweighted", states, False), ("bare", bare, True), ("weighted", states, True)):
        plan = Collect(second_moment="pooled", weighted=weighted)
        found[name] = next(walk(model, given)).collect(plan, (Site.DOWN,))[Site.DOWN].second_moment().mean
    assert torch.equal(found["unweighted"], found["bare"])
    assert not torch.allclose(found["unweighted"], found["weighted"], rtol=1e-2)


def test_cells_merge_to_the_whole(model: MaskedDiffusionModel) -> None:
    visit = next(walk(model, partly_masked(model, BINS)))
    means = {
        kept: visit.collect(Collect(second_moment=kept), (Site.OUT,))[Site.OUT].second_moment().mean
        for kept in ("pooled", "state", "bin")
    }
    close(means["state"], means["pooled"])
    close(means["bin"], means["pooled"])


def test_merging_leaves_the_cells_alone(model: MaskedDiffusionModel) -> None:
    found = next(walk(model, partly_masked(model, BINS))).collect(Collect(second_moment="bin"), (Site.OUT,))[Site.OUT]
    first = found.moments().mean, found.second_moment(TokenState.MASKED).mean, found.moments().count
    again = found.moments().mean, found.second_moment(TokenState.MASKED).mean, found.moments().count
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[2] == again[2]


def tally(rows: Iterable[Tensor]) -> Counter[bytes]:
    return Counter(row.double().numpy().tobytes() for row in rows)


@pytest.mark.parametrize("capacity", [5, 10_000])
def test_sampled_rows_are_rows_of_their_token_state(model: MaskedDiffusionModel, capacity: int) -> None:
    states = partly_masked(model, BINS)
    naive = capture(model, states)
    for visit in walk(model, states):
        for site, found in visit.collect(Collect(moments=False, rows=capacity)).items():
            everything = naive[visit.index, site]
            for state in BIDIRECTIONAL:
                chosen, rows = everything.chosen(state, None), found.rows(state)
                assert len(rows) == min(capacity, len(chosen))
                assert tally(rows) <= tally(everything.x_ND[chosen])
            assert len(found.rows()) == sum(len(found.rows(state)) for state in BIDIRECTIONAL)


def test_a_token_state_that_is_missing_is_told(model: MaskedDiffusionModel) -> None:
    name = model.block_name(0).replace(".", r"\.")
    for fill, missing in ((model.mask_token_id, TokenState.UNMASKED), (7, TokenState.MASKED)):
        ids = torch.full((2, 6), fill)
        share = torch.full((2,), float(fill == model.mask_token_id), dtype=torch.float64)
        states = CalibrationStates([StateBatch(ids, torch.ones_like(ids).bool(), share)], model.mask_token_id, BINS)
        found = next(walk(model, states)).collect(Collect(second_moment="state", rows=3))[Site.QKV]
        for ask in (found.moments, found.second_moment, found.rows):
            with pytest.raises(DataError, match=rf"{name} qkv_input: .* no {missing.value} token; choose other"):
                ask(missing)
        assert found.moments().count == 12
        assert len(found.rows()) == 3


def test_an_empty_bin_is_told() -> None:
    found = SiteStatistics("here", Collect(second_moment="bin"), bins=4)
    batch = StateBatch(torch.zeros(1, 3).long(), torch.ones(1, 3).bool(), torch.tensor([0.5]))
    found.update(torch.randn(1, 3, 2), batch, of_states(torch.tensor([[True, False, False]])))
    assert found.moments(TokenState.MASKED, 1).count == 1
    for ask in (found.moments, found.second_moment):
        with pytest.raises(DataError, match=r"here: .* no masked token at mask ratios of 0\.75 to 1; choose other"):
            ask(TokenState.MASKED, 3)


def test_padding_may_hold_anything() -> None:
    x_BLD = torch.randn(2, 4, 3)
    visible_BL = torch.tensor([[True, True, False, False], [False, True, True, True]])
    masked_BL = torch.tensor([[True, False, True, False], [False, True, True, False]])
    x_BLD[0, 2], x_BLD[0, 3], x_BLD[1, 0] = torch.nan, torch.inf, 1e30
    batch = StateBatch(torch.zeros(2, 4).long(), visible_BL, torch.tensor([0.5, 2 / 3], dtype=torch.float64))
    found = SiteStatistics("here", Collect(second_moment="state", rows=9), bins=2)
    found.update(x_BLD, batch, of_states(masked_BL))
    rows_ND = torch.stack([x_BLD[0, 0], x_BLD[0, 1], x_BLD[1, 1], x_BLD[1, 2], x_BLD[1, 3]]).double()
    close(found.moments().mean, rows_ND.mean(0))
    close(found.second_moment().mean, rows_ND.T @ rows_ND / 5)
    assert tally(found.rows(TokenState.MASKED)) == tally(rows_ND[[0, 2, 3]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    batch = StateBatch(torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), torch.tensor([0.5]))
    x_BLD = torch.zeros(1, 2, 3)
    x_BLD[0, 1, 2] = value
    with pytest.raises(DataError, match="here: activations are not finite"):
        SiteStatistics("here", Collect(), bins=1).update(x_BLD, batch, of_states(torch.zeros(1, 2).bool()))


def test_nothing_finer_than_what_was_collected() -> None:
    batch = StateBatch(torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), torch.tensor([0.5]))

    def seen(plan: Collect) -> SiteStatistics:
        found = SiteStatistics("here", plan, bins=2)
        found.update(torch.randn(1, 2, 3), batch, of_states(torch.tensor([[True, False]])))
        return found

    for kept, state, k in (
        (None, None, None),
        ("pooled", TokenState.UNMASKED, None),
        ("pooled", None, 0),
        ("state", TokenState.MASKED, 0),
        ("state", None, 1),
    ):
        with pytest.raises(ValueError, match=f"here: second moments collected: {kept}"):
            seen(Collect(second_moment=kept)).second_moment(state, k)
    with pytest.raises(ValueError, match="here: moments were not collected"):
        seen(Collect(moments=False, rows=1)).moments()
    with pytest.raises(ValueError, match="here: no rows were sampled"):
        seen(Collect()).rows()


@pytest.mark.parametrize("bins", [1, 4])
def test_sampled_rows_depend_neither_on_batches_nor_on_bins(bins: int) -> None:
    """`runtime.batch_size` and `calibration.bins` must not change what is fitted from the sample."""
    generator = torch.Generator().manual_seed(0)
    x_BLD = torch.randn(12, 10, 3, generator=generator)
    ratio_B = torch.linspace(0.05, 0.95, 12, dtype=torch.float64)
    masked_BL = torch.rand(12, 10, generator=generator) < ratio_B[:, None]
    visible_BL = torch.ones_like(masked_BL)

    def sample(size: int, bins: int) -> torch.Tensor:
        statistics = SiteStatistics("site", Collect(moments=False, rows=7), bins)
        for begin in range(0, 12, size):
            rows = slice(begin, begin + size)
            batch = StateBatch(masked_BL[rows].long(), visible_BL[rows], ratio_B[rows])
            statistics.update(x_BLD[rows], batch, of_states(masked_BL[rows]))
        return statistics.rows()

    for size in (1, 5, 12):
        assert torch.equal(sample(size, bins), sample(12, 1))
