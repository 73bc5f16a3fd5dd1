"""TAC against moments recomputed token by token from hooked forward passes, and against exact identities.

The exact outputs are those of the plain model, the quantized ones those of the model that `apply` leaves.
Shape suffixes: T tokens, N channel blocks, G channels of a block, C conditions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates
from starquant.config.bits import BitsSpec
from starquant.errors import ConfigError
from starquant.methods.base import Method
from starquant.methods.fitted import ENDS, Fitted, block_part
from starquant.methods.star_quant import method as star_quant
from starquant.methods.star_quant.tac import MATRIX, SHIFT
from starquant.models.base import MaskedDiffusionModel
from starquant.models.roles import Site
from starquant.quantized.install import install
from tests.support.methods import method_named
from tests.support.models import fresh, logits
from tests.support.states import states_of

#: Nothing but TAC: no rotation, gate or clip, so that the quantized block is the one `install` makes.
BARE = (
    "method.transform.fit=fixed",
    "method.transform.state_clip=false",
    "method.sgat.enabled=false",
    "method.residual_rotation=none",
    "method.head_hadamard=false",
    "method.out_hadamard=false",
    "method.down_hadamard=false",
    "method.weights.mse_clip=false",
)
LOW = ("bits=w4a4", "bits.attention.v=4", "bits.attention.p=8", "bits.attention.k=4", "method.qk_hadamard=false")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 150, 15, 16]])


def bare(*overrides: str) -> tuple[Method, BitsSpec]:
    return method_named("star_quant", *BARE, *overrides)


def outputs(model: MaskedDiffusionModel, states: CalibrationStates) -> list[list[Tensor]]:
    """Attention outputs in front of everything at their site, [block][batch]."""
    found: list[list[Tensor]] = []
    handles = []
    for block in model.trunk().blocks:
        seen: list[Tensor] = []
        found.append(seen)
        module = model.block_sites(block).inputs[Site.OUT]
        handles.append(module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double())))
    with torch.no_grad():
        for batch in states.batches:
            model(batch.ids_BL, batch.visible_BL)
    for handle in handles:
        handle.remove()
    return found


Chosen = Callable[[int, Fraction], bool]


def tokens(found: list[Tensor], states: CalibrationStates, chosen: Chosen = lambda state, ratio: True) -> np.ndarray:
    """Visible tokens one by one; `chosen` is given the state (0 masked) and the row's masked share, as a fraction."""
    picked = []
    for batch, x_BLD in zip(states.batches, found, strict=True):
        for ids, visible, x_LD in zip(batch.ids_BL.tolist(), batch.visible_BL.tolist(), x_BLD, strict=True):
            seen = [token == states.mask_id for token, shown in zip(ids, visible, strict=True) if shown]
            ratio = Fraction(sum(seen), len(seen))
            for token, shown, x_D in zip(ids, visible, x_LD, strict=True):
                if shown and chosen(0 if token == states.mask_id else 1, ratio):
                    picked.append(x_D.numpy())
    return np.array(picked)


def ridge(z_TG: np.ndarray, q_TG: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """(M, d) by a solver of plain least squares: the pull to the identity is a set of further equations."""
    z, q = z_TG - z_TG.mean(0), q_TG - q_TG.mean(0)
    pull = math.sqrt(damping * q.var(0).mean() * len(q)) * np.eye(q.shape[1])
    matrix = np.linalg.lstsq(np.concatenate((q, pull)), np.concatenate((z, pull)), rcond=None)[0].T
    return matrix, z_TG.mean(0) - matrix @ q_TG.mean(0)


def root(matrix: np.ndarray) -> np.ndarray:
    """The square root, by Denman and Beavers' iteration."""
    y, z = matrix, np.eye(len(matrix))
    for _ in range(40):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return y


def matching(z_TG: np.ndarray, q_TG: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """(M, d) that bring the mean and the damped covariance of q to those of z."""
    covariances = [np.cov(x.T, bias=True) for x in (z_TG, q_TG)]
    damped = [c + damping * c.trace() / len(c) * np.eye(len(c)) for c in covariances]
    matrix = root(damped[0]) @ np.linalg.inv(root(damped[1]))
    return matrix, z_TG.mean(0) - matrix @ q_TG.mean(0)


SOLVERS = {"moment_matching": matching, "least_squares": ridge}


def expect_maps(tensors: dict[str, Tensor], c: int, z_TD: np.ndarray, q_TD: np.ndarray, solver: str) -> None:
    g = tensors[MATRIX].shape[-1]
    for n in range(z_TD.shape[1] // g):
        here = slice(n * g, (n + 1) * g)
        matrix, shift = SOLVERS[solver](z_TD[:, here], q_TD[:, here], 0.01)
        np.testing.assert_allclose(tensors[MATRIX][c, n].numpy(), matrix, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(tensors[SHIFT][c, n].numpy(), shift, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("architecture", ["llada_gqa", "llada_mha", "dream_gqa"])
def test_fed_quantized_moments_are_of_the_plain_and_of_the_applied_model(architecture: str, solver: str) -> None:
    """In every block: the exact side comes from exact blocks, the other from blocks with TAC and all in place."""
    gated = str(solver == "least_squares").lower()  # the values then come from gated inputs
    method, bits = bare(*LOW, f"method.tac.solver={solver}", f"method.sgat.enabled={gated}")
    model = fresh(architecture)
    states = replace(states_of(model), inputs="quantized")
    exact = outputs(model, states)
    learned = method.fit(model, bits, states)
    method.apply(model, learned, bits)
    for index, quantized in enumerate(outputs(model, states)):
        z_TD, q_TD = tokens(exact[index], states), tokens(quantized, states)
        expect_maps(learned.get(block_part(index)), 0, z_TD, q_TD, solver)


def quantized_on_exact_inputs(model: MaskedDiffusionModel, bits: BitsSpec, states: CalibrationStates) -> list[Tensor]:
    """Attention outputs of the second block, quantized, on hidden states of the plain model."""
    whole = fresh("llada_gqa")
    install(whole, bits)
    block, found = whole.trunk().blocks[1], []
    whole.block_sites(block).inputs[Site.OUT].register_forward_pre_hook(lambda _, args: found.append(args[0].double()))
    with torch.no_grad():
        for batch in states.batches:
            visible = None if bool(batch.visible_BL.all()) else batch.visible_BL
            hidden = model(batch.ids_BL, visible, output_hidden_states=True).hidden_states[1]
            block(hidden, model.context(batch.ids_BL, visible))
    return found


def test_fed_full_precision_every_block_is_quantized_on_exact_inputs() -> None:
    method, bits = bare(*LOW)
    model = fresh("llada_gqa")
    states = states_of(model)
    tensors = method.fit(model, bits, states).get(block_part(1))
    exact, quantized = outputs(model, states)[1], quantized_on_exact_inputs(model, bits, states)
    expect_maps(tensors, 0, tokens(exact, states), tokens(quantized, states), "moment_matching")


@pytest.mark.parametrize("condition", ["state", "bin"])
def test_maps_of_a_condition_are_of_its_tokens(condition: str) -> None:
    """Bin k: masked shares of visible tokens in (k/4, (k+1)/4]; one short of 4 g tokens takes its state's."""
    method, bits = bare(*LOW, f"method.tac.condition={condition}", "method.tac.block_size=4")
    model = fresh("llada_gqa")
    states = states_of(model)
    tensors = method.fit(model, bits, states).get(block_part(1))
    exact, quantized = outputs(model, states)[1], quantized_on_exact_inputs(model, bits, states)
    bins = 4 if condition == "bin" else 1
    assert len(tensors[MATRIX]) == len(tensors[SHIFT]) == 2 * bins
    short = 0
    for c in range(2 * bins):

        def chosen(state: int, ratio: Fraction, c: int = c) -> bool:
            return state == c % 2 and max(math.ceil(ratio * bins) - 1, 0) == c // 2

        here: Chosen = chosen
        if len(tokens(exact, states, chosen)) < 16:
            short, here = short + 1, lambda state, ratio, c=c: state == c % 2
        expect_maps(tensors, c, tokens(exact, states, here), tokens(quantized, states, here), "moment_matching")
    assert bool(short) == (condition == "bin")


def applied(method: Method, bits: BitsSpec, learned: Fitted, architecture: str) -> Tensor:
    model = fresh(architecture)
    method.apply(model, learned, bits)
    return logits(model, IDS.where(IDS < 100, model.mask_token_id))


def with_maps(learned: Fitted, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None) -> Fitted:
    """The same fit with other maps; None for none."""
    copy = Fitted()
    for part in learned.parts():
        tensors = learned.get(part)
        if part != ENDS:
            maps = tensors.pop(MATRIX), tensors.pop(SHIFT)
            tensors |= {} if change is None else dict(zip((MATRIX, SHIFT), change(*maps), strict=True))
        copy.put(part, tensors)
    return copy


@pytest.mark.parametrize("architecture", ["llada_mha", "llada_gqa"])
@pytest.mark.parametrize("placement", ["output", "value"])
def test_the_identity_map_changes_nothing_and_the_fitted_one_does(architecture: str, placement: str) -> None:
    quick = ("method.transform.steps=5", "method.transform.rows=16", "method.weights.mse_clip=false")
    method, bits = method_named("star_quant", "bits=w4a4", *quick, f"method.tac.placement={placement}")
    model = fresh(architecture)
    learned = method.fit(model, bits, states_of(model))

    def identity(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return torch.eye(matrix.shape[-1]).expand_as(matrix).contiguous(), torch.zeros_like(shift)

    without = applied(method, bits, with_maps(learned, None), architecture)
    assert torch.equal(applied(method, bits, with_maps(learned, identity), architecture), without)
    assert not torch.allclose(applied(method, bits, learned, architecture), without, rtol=1e-2)


VALUE = "method.tac.placement=value"
SHARED = [("llada_mha", 16), ("llada_gqa", 16), ("llada_gqa", 4), ("dream_gqa", 8)]


@pytest.mark.parametrize(("architecture", "g"), SHARED)
def test_on_the_values_it_is_the_same_as_on_the_output(architecture: str, g: int) -> None:
    """Keys at 4 bits: softmax rows sum to 1 whatever they are. Heads that read the same values share their map."""
    settings = ("bits=w16a16", "bits.attention.k=4", f"method.tac.block_size={g}")
    (value, bits), (output, _) = bare(*settings, VALUE), bare(*settings)
    model = fresh(architecture)
    attention = model.block_sites(model.trunk().blocks[0]).attention
    learned = value.fit(model, bits, states_of(model))
    groups, inside = attention.n_heads // attention.n_kv_heads, attention.head_dim // g
    matrix = learned.get(block_part(0))[MATRIX][0].unflatten(0, (-1, groups, inside))
    assert torch.equal(matrix, matrix[:, :1].expand_as(matrix))

    def strong(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        n = torch.arange(matrix.shape[1])  # other maps for every block of a head and every group of heads
        size = (n % inside + 2 * (n // (groups * inside)))[:, None]
        return matrix + 0.1 * size[..., None] * matrix.roll(1, -1), shift + 0.1 * size

    exact = applied(output, bits, with_maps(learned, None), architecture)
    there, here = (applied(method, bits, with_maps(learned, strong), architecture) for method in (value, output))
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)
    assert float((here - exact).norm() / exact.norm()) > 0.02  # not because nothing happens


def test_shared_maps_are_of_the_tokens_of_all_heads_of_a_group() -> None:
    method, bits = bare("bits=w4a4", "method.tac.placement=value", "method.tac.solver=least_squares")
    model = fresh("llada_gqa")
    states = states_of(model)
    tensors = method.fit(model, bits, states).get(block_part(1))
    sides = outputs(model, states)[1], quantized_on_exact_inputs(model, bits, states)
    heads = [tokens(side, states).reshape(-1, 2, 3, 16) for side in sides]  # two groups of three heads
    for head in range(6):
        z, q = (x[:, head // 3].reshape(-1, 16) for x in heads)
        expect = ridge(z, q, 0.01)
        np.testing.assert_allclose(tensors[MATRIX][0, head].numpy(), expect[0], rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(tensors[SHIFT][0, head].numpy(), expect[1], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("method.tac.block_size=64",), r"^method\.tac\.block_size: got 64, which does not divide the 96"),
        ((VALUE, "method.tac.block_size=32"), r"^method\.tac\.block_size: got 32, .* the head width 16"),
        ((VALUE, "method.tac.condition=state"), r"^method\.tac\.condition: got 'state', .*allowed: all$"),
        ((VALUE, "method.tac.condition=bin"), r"^method\.tac\.condition: got 'bin', .*allowed: all$"),
        ((VALUE, "bits.attention.v=8"), r"^bits\.attention\.v: got 8, .*method\.tac\.placement=output$"),
        ((VALUE, "bits.attention.p=8"), r"^bits\.attention\.p: got 8, .*method\.tac\.placement=output$"),
    ],
)
def test_what_would_not_divide_or_not_be_exact_is_refused(settings: tuple[str, ...], message: str) -> None:
    method, bits = bare("bits=w4a4", *settings)
    model = fresh("llada_gqa")
    with pytest.raises(ConfigError, match=message) as caught:
        method.validate(model, bits)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=message):
        method.fit(model, bits, states_of(model))
    bare("bits=w4a4", *settings, "method.tac.enabled=false")[0].validate(model, bits)


def test_a_block_may_span_heads_on_the_output() -> None:
    method, bits = bare("bits=w4a4", "method.tac.block_size=32", "bits.attention.v=4", "bits.attention.q=4")
    model = fresh("llada_gqa")
    tensors = method.fit(model, bits, states_of(model)).get(block_part(0))
    assert tensors[MATRIX].shape == (1, 3, 32, 32)


def test_values_are_mapped_without_undoing_quantized_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ of the output projection must see the attention that will run."""
    method, bits = bare("bits=w4a4", "bits.attention.k=4", VALUE, "method.weights.name=gptq")
    model, seen = fresh("llada_gqa"), []
    solve = star_quant.solve_sites

    def spied(visit, sites, *rest):  # type: ignore[no-untyped-def]
        if sites == (Site.OUT,):
            seen.append(visit.sites.attention.core.formats["k"].bits)
        return solve(visit, sites, *rest)

    monkeypatch.setattr(star_quant, "solve_sites", spied)
    method.fit(model, bits, replace(states_of(model), inputs="quantized"))
    assert seen == [4, 4]
