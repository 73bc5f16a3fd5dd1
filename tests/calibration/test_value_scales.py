"""IA-AQ's search for V's scales against loops over heads, channels and candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from starquant.calibration.batches import CalibrationStates, StateBatch
from starquant.calibration.value_scales import ALPHAS, search_value_scales
from starquant.calibration.walk import walk
from starquant.errors import DataError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.layers import AttentionCore
from starquant.models.roles import Role
from starquant.numerics import hadamard_matrix
from starquant.quantized import HadamardTransform, transform_queries_and_keys
from tests.support.models import ARCHITECTURES, fresh
from tests.support.states import partly_masked

BITS = {"q": 8, "k": 8, "p": 4, "v": 3}
BLOCK = 1


@dataclass(frozen=True)
class Operands:
    """What the attention of one block computes with for one sequence, padding cut away."""

    q_HNE: Tensor
    k_KNE: Tensor
    v_KNE: Tensor


class _Recorder(AttentionCore):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, mask: Tensor | None) -> Tensor:
        self.seen.append((q_BHLE, k_BKLE, v_BKLE))
        return super().forward(q_BHLE, k_BKLE, v_BKLE, mask)


def capture(model: MaskedDiffusionModel, states: CalibrationStates) -> list[Operands]:
    """Run the whole model on every sequence by itself, without its padding."""
    attention = model.block_sites(model.trunk().blocks[BLOCK]).attention
    before, attention.core = attention.core, _Recorder()
    with torch.no_grad():
        for batch in states.batches:
            for ids_L, visible_L in zip(batch.ids_BL, batch.visible_BL, strict=True):
                model(ids_L[visible_L][None])
    seen, attention.core = attention.core.seen, before
    return [Operands(q[0], k[0], v[0]) for q, k, v in seen]


def on_grid(x: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Round each row to 2^bits levels between -max and max, or 0 and max."""
    if bits == 16:
        return x
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    step = x.abs().amax(-1, keepdim=True) / top
    return torch.round(x / step) * step


def slow_errors(
    found: list[Operands], bits: dict[str, int], transform: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """Return (largest |v| / qmax [K, E], error [A, K, E]): one channel and one candidate at a time."""
    heads, channels = found[0].v_KNE.shape[0], found[0].v_KNE.shape[2]
    groups = found[0].q_HNE.shape[0] // heads
    qmax = 2 ** (bits["v"] - 1) - 1
    start_KE = torch.stack([one.v_KNE.abs().amax(1) for one in found]).amax(0) / qmax
    error_AKE = torch.zeros(len(ALPHAS), heads, channels, dtype=torch.float64)
    for one in found:
        for h in range(heads * groups):
            q_NE, k_NE = (
                on_grid(transform(one.q_HNE[h]), bits["q"]),
                on_grid(transform(one.k_KNE[h // groups]), bits["k"]),
            )
            p_NN = on_grid((q_NE @ k_NE.T / math.sqrt(channels)).softmax(-1), bits["p"], signed=False)
            for e in range(channels):
                v_N = one.v_KNE[h // groups, :, e]
                for a, alpha in enumerate(ALPHAS):
                    s = alpha * float(start_KE[h // groups, e])
                    lost_N = torch.round(v_N / s).clamp(-qmax - 1, qmax) * s - v_N
                    error_AKE[a, h // groups, e] += float((p_NN @ lost_N).double().square().sum())
    return start_KE, error_AKE


def searched(model: MaskedDiffusionModel, states: CalibrationStates, bits: dict[str, int]) -> Tensor:
    visits = walk(model, states)
    next(visits)
    return search_value_scales(next(visits), bits)


def expect_best(scale_KE: Tensor, start_KE: Tensor, error_AKE: Tensor) -> None:
    """Float32 sums may differ in their last digits, so candidates that tie may be swapped."""
    assert scale_KE.shape == start_KE.shape
    assert scale_KE.dtype == torch.float32
    ratio_KE = scale_KE / start_KE
    distance, chosen_KE = (ratio_KE - torch.tensor(ALPHAS)[:, None, None]).abs().min(0)
    assert float(distance.max()) < 1e-4
    error_KE = error_AKE.gather(0, chosen_KE[None])[0]
    assert bool((error_KE <= error_AKE.amin(0) * (1 + 1e-2) + 1e-12).all())
    assert bool((error_KE <= error_AKE[0] * (1 + 1e-2)).all())  # never worse than the whole range
    assert float((chosen_KE == error_AKE.argmin(0)).double().mean()) > 0.97
    assert len(chosen_KE.unique()) > 3  # the search matters


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> MaskedDiffusionModel:
    return fresh(request.param)


@pytest.mark.parametrize("bits", [BITS, {"q": 16, "k": 16, "p": 16, "v": 4}], ids=["all", "v only"])
def test_search_against_loops_on_padded_batches(model: MaskedDiffusionModel, bits: dict[str, int]) -> None:
    states = partly_masked(model)
    expect_best(searched(model, states, bits), *slow_errors(capture(model, states), bits))


def test_alphas_go_down_from_the_whole_range() -> None:
    assert ALPHAS[0] == 1.0
    assert ALPHAS[-1] == pytest.approx(0.8)
    assert list(ALPHAS) == sorted(ALPHAS, reverse=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: MaskedDiffusionModel, side: str) -> None:
    plain = partly_masked(model).batches[0]
    noise = torch.randint(0, 190, (4, 9))
    order = (noise, plain.ids_BL) if side == "left" else (plain.ids_BL, noise)
    seen = (torch.zeros(4, 9), torch.ones(plain.ids_BL.shape))
    visible_BL = torch.cat(seen if side == "left" else seen[::-1], 1).bool()
    padded = StateBatch(torch.cat(order, 1), visible_BL, plain.ratio_B)
    first, second = (
        searched(model, CalibrationStates([batch], model.mask_token_id), BITS) for batch in (plain, padded)
    )
    same = (first / second - 1).abs() < 1e-4
    assert float(same.double().mean()) > 0.97  # the attention of another width is summed in another order


def test_queries_and_keys_are_rounded_in_the_basis_they_are_read_in(model: MaskedDiffusionModel) -> None:
    """Behind a Hadamard transform, the probabilities are those of transformed queries and keys."""
    states, bits = partly_masked(model), {"q": 2, "k": 2, "p": 4, "v": 3}
    found = capture(model, states)
    visits = walk(model, states)
    next(visits)
    visit = next(visits)
    attention = visit.sites.attention
    transform_queries_and_keys(attention, HadamardTransform(attention.head_dim))
    scale_KE = search_value_scales(visit, bits)
    matrix = hadamard_matrix(attention.head_dim, torch.float32)
    start_KE, error_AKE = slow_errors(found, bits, lambda x: x @ matrix)
    expect_best(scale_KE, start_KE, error_AKE)
    _, other_AKE = slow_errors(found, bits)
    assert not torch.equal(other_AKE.argmin(0), error_AKE.argmin(0))


def test_the_attention_is_put_back(model: MaskedDiffusionModel) -> None:
    visit = next(walk(model, partly_masked(model)))
    core = visit.sites.attention.core
    modules = dict(visit.block.named_modules())
    search_value_scales(visit, BITS)
    assert visit.sites.attention.core is core
    assert dict(visit.block.named_modules()) == modules


def test_values_that_are_not_finite_are_named(model: MaskedDiffusionModel) -> None:
    name = model.block_name(0).replace(".", r"\.")
    visit = next(walk(model, partly_masked(model)))
    core = visit.sites.attention.core
    with torch.no_grad():
        visit.sites.linears[Role.V].weight[2] = torch.inf
    with pytest.raises(DataError, match=f"{name} attention V: values are not finite"):
        search_value_scales(visit, BITS)
    assert visit.sites.attention.core is core


def test_a_channel_of_zeros_gets_a_scale_that_keeps_it_zero(model: MaskedDiffusionModel) -> None:
    visit = next(walk(model, partly_masked(model)))
    linear = visit.sites.linears[Role.V]
    with torch.no_grad():
        linear.weight[2] = 0.0
        if linear.bias is not None:
            linear.bias[2] = 0.0
    scale_KE = search_value_scales(visit, BITS)
    assert bool(torch.isfinite(scale_KE).all())
    assert bool((scale_KE > 0).all())
