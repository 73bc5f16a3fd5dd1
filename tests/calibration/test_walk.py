"""The walk against plain forward passes: what each block is fed, and that the model is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from starquant.calibration.batches import CalibrationStates, bin_of
from starquant.calibration.site_statistics import Collect
from starquant.calibration.walk import BlockVisit, Pair, walk
from starquant.errors import DataError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Role, Site
from starquant.numerics import hadamard_matrix
from starquant.quantized import HadamardTransform
from starquant.quantized.install import install, quantize_block, round_to_nearest
from starquant.quantized.rewriting import hadamard_input
from starquant.quantized.tables import quantize_embedding, round_embedded
from tests.support.models import ARCHITECTURES, fresh, hooks_of
from tests.support.specs import FOUR_BITS, spec
from tests.support.states import partly_masked


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> MaskedDiffusionModel:
    return fresh(request.param)


def hidden_states(model: MaskedDiffusionModel, states: CalibrationStates) -> list[list[Tensor]]:
    """What stands in front of block k on batch i of plain forward passes: [k][i]."""
    with torch.no_grad():
        passes = [model(b.ids_BL, b.visible_BL, output_hidden_states=True).hidden_states for b in states.batches]
    return [list(column) for column in zip(*passes, strict=True)]


def fed(visit: BlockVisit) -> list[Tensor]:
    """What the block of a visit is fed, batch by batch, seen by a hook of our own."""
    seen: list[Tensor] = []
    handle = visit.block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    visit.observe()
    handle.remove()
    return seen


def expect_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want) == 3
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_full_precision_inputs_are_those_of_a_plain_forward_pass(model: MaskedDiffusionModel) -> None:
    """Even though every copy is quantized as soon as it was observed."""
    states = partly_masked(model)
    expected = hidden_states(model, states)
    indices = []
    for visit in walk(model, states):
        expect_equal(fed(visit), expected[visit.index])
        quantize_block(model, visit.block, visit.index, FOUR_BITS, round_to_nearest)
        visit.collect(Collect())  # a second pass, now quantized, changes nothing behind
        indices.append(visit.index)
    assert indices == list(range(model.config.num_hidden_layers))


def test_blocks_that_nobody_observes_are_run_all_the_same(model: MaskedDiffusionModel) -> None:
    states = partly_masked(model)
    last = model.config.num_hidden_layers - 1
    for visit in walk(model, states):
        if visit.index == last:
            expect_equal(fed(visit), hidden_states(model, states)[last])


def test_quantized_inputs_are_those_of_a_model_with_quantized_blocks(model: MaskedDiffusionModel) -> None:
    states = partly_masked(model, inputs="quantized")
    whole = copy.deepcopy(model)
    install(whole, FOUR_BITS)
    expected, exact = hidden_states(whole, states), hidden_states(model, states)
    for visit in walk(model, states):
        visit.collect(Collect())
        expect_equal(fed(visit), expected[visit.index])
        assert visit.index == 0 or not torch.equal(expected[visit.index][0], exact[visit.index][0])
        quantize_block(model, visit.block, visit.index, FOUR_BITS, round_to_nearest)


def test_the_embedding_is_mapped(model: MaskedDiffusionModel) -> None:
    states = partly_masked(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.trunk().embedding.weight.mul_(-2.0)
    expected = hidden_states(other, states)
    for visit in walk(model, states, embed=lambda hidden: -2.0 * hidden):
        expect_equal(fed(visit), expected[visit.index])


def test_sites_are_seen_as_the_linears_read_them(model: MaskedDiffusionModel) -> None:
    """Behind a transform that the visitor put there."""
    states = partly_masked(model)
    for visit in walk(model, states):
        before = visit.collect(Collect(second_moment="pooled"), (Site.DOWN,))[Site.DOWN].second_moment().mean
        linear = visit.sites.linears[Role.DOWN]
        hadamard_input(linear)
        visit.sites.inputs[Site.DOWN].transform = HadamardTransform(linear.in_features)
        after = visit.collect(Collect(second_moment="pooled"), (Site.DOWN,))[Site.DOWN].second_moment().mean
        matrix = hadamard_matrix(linear.in_features)
        torch.testing.assert_close(after, matrix.T @ before @ matrix, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def _ruin(visit: BlockVisit) -> None:
    visit.collect(Collect(second_moment="bin", rows=4))
    quantize_block(visit.model, visit.block, visit.index, FOUR_BITS, round_to_nearest)
    with torch.no_grad():
        for parameter in visit.block.parameters():
            parameter.fill_(0.25)


@pytest.mark.parametrize("inputs", ["full_precision", "quantized"])
def test_the_model_is_left_as_it_was(model: MaskedDiffusionModel, inputs: str) -> None:
    _expect_unchanged(model, lambda: [_ruin(visit) for visit in walk(model, partly_masked(model, inputs=inputs))])


def test_the_embedded_model_is_left_as_it_was(tiny: MaskedDiffusionModel) -> None:
    states = partly_masked(tiny)
    expected = hidden_states(tiny, states)

    def visit_all() -> None:
        for visit in walk(tiny, states):
            expect_equal(fed(visit), expected[visit.index])
            _ruin(visit)

    _expect_unchanged(tiny, visit_all)


def _expect_unchanged(model: MaskedDiffusionModel, action: Callable[[], object]) -> None:
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    flags = [p.requires_grad for p in model.parameters()]
    action()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert hooks_of(model) == []


def test_errors_inside_a_visit_leave_no_hooks(model: MaskedDiffusionModel) -> None:
    states = partly_masked(model)
    kept: list[nn.Module] = []

    def visits() -> Iterator[BlockVisit]:
        for visit in walk(model, states):
            kept.append(visit.block)
            yield visit

    def interrupt() -> None:
        for visit in visits():
            with torch.no_grad():
                visit.sites.norms[Site.GATE_UP].weight[0] = torch.inf
            with pytest.raises(DataError):
                visit.collect(Collect())
            raise RuntimeError("by the visitor")

    def visit_all() -> None:
        with pytest.raises(RuntimeError, match="by the visitor"):
            interrupt()

    _expect_unchanged(model, visit_all)
    assert len(kept) == 1
    assert hooks_of(kept[0]) == []


def test_copies_carry_no_gradient(model: MaskedDiffusionModel) -> None:
    for visit in walk(model, partly_masked(model)):
        visit.collect(Collect(rows=2))
        assert not any(p.requires_grad for p in visit.block.parameters())
        assert not any(x.requires_grad for x in fed(visit))


def test_names_are_the_models_own(model: MaskedDiffusionModel) -> None:
    declared: set[str] = set()
    for visit in walk(model, partly_masked(model)):
        assert set(visit.linears) == {f"{visit.name}.{n}" for n, m in visit.block.named_modules() if _is_linear(m)}
        declared |= set(visit.linears)
    assert declared == set(model.linears())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def test_no_states(model: MaskedDiffusionModel) -> None:
    with pytest.raises(DataError, match=r"got no states.*calibration\.source\.segments"):
        next(walk(model, CalibrationStates([], model.mask_token_id)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(model: MaskedDiffusionModel, value: float) -> None:
    with torch.no_grad():
        model.block_sites(model.trunk().blocks[1]).norms[Site.GATE_UP].weight[3] = value
    name = model.block_name(1).replace(".", r"\.")
    visits = walk(model, partly_masked(model))
    next(visits).collect(Collect())
    second = next(visits)
    second.collect(Collect(), (Site.QKV, Site.OUT))
    with pytest.raises(DataError, match=f"{name} gate_up_input: activations are not finite"):
        second.collect(Collect())


@pytest.mark.parametrize("bins", [1, 3, 4, 5, 7, 10])
def test_bins_against_fractions(bins: int) -> None:
    """(k/bins, (k+1)/bins] is bin k, and 0 is in bin 0."""
    counts = [(m, n) for n in (1, 7, 10, 60, 128) for m in range(n + 1)]
    expected = [
        0 if m == 0 else next(k for k in range(bins) if Fraction(m, n) <= Fraction(k + 1, bins)) for m, n in counts
    ]
    ratio_B = torch.tensor([m / n for m, n in counts], dtype=torch.float64)
    assert bin_of(ratio_B, bins).tolist() == expected


@pytest.mark.parametrize(
    "settings", [("bits.embedding=4",), ("bits=q4_0",), ("bits.embedding=8", "bits.tables=blocks")]
)
def test_blocks_that_are_fed_quantized_inputs_begin_with_the_quantized_embedding(settings: tuple[str, ...]) -> None:
    """Behind the map that the visitor rewrites blocks to, as the table is; the exact side stays as it is."""
    bits, model = spec("bits=w4a4", *settings).bits, fresh("llada_gqa")
    width = model.trunk().embedding.embedding_dim
    rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0]
    states = dataclasses.replace(partly_masked(model), inputs="quantized")
    table = fresh("llada_gqa")
    table.trunk().embedding.weight.data = table.trunk().embedding.weight.data @ rotation
    exact = [table.trunk().embedding(batch.ids_BL) for batch in states.batches]
    quantize_embedding(table, bits, packed=False)
    wanted = [table.trunk().embedding(batch.ids_BL) for batch in states.batches]
    rounded = functools.partial(round_embedded, bits=bits)
    visit = next(walk(model, states, lambda hidden_BLD: hidden_BLD @ rotation, rounded=rounded))
    for got, want, before in zip(fed(visit), wanted, exact, strict=True):
        apart = (got - want).abs() > 1e-5  # a product of fewer rows may fall to the other side of an edge
        assert float(apart.float().mean()) < 0.01
        assert float((want - before).detach().norm() / before.detach().norm()) > 0.003
    visit.keep_exact()
    pairs: list[Pair] = []
    visit.side_by_side(visit.block, Site.QKV, pairs.append)
    normed = [visit.sites.norms[Site.QKV](hidden_BLD) for hidden_BLD in exact]
    for pair, want in zip(pairs, normed, strict=True):
        torch.testing.assert_close(pair.exact_BLD, want, rtol=1e-5, atol=1e-5)
