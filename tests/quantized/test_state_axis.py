"""One table: on every axis of states index 0 is masked, 1 unmasked, and each state uses channels of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from starquant.calibration.batches import StateBatch
from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.kernels import Prologue, TokenStates, quantize_tokens, reference
from starquant.methods.star_quant.base_transform import gated
from starquant.models.context import Context
from starquant.numerics import BIDIRECTIONAL, PerToken, QuantFormat, TokenState, gate_channels, state_indices
from starquant.quantized import ActivationQuantizer, BlockAffine, StateGate
from starquant.quantized.site_prologue import SitePrologue

#: Channels [3 shared | 2 of masked tokens | 3 of unmasked tokens]: index on the axis, and what a state uses of 8 ones.
WIDTH, D_M, D_U = 8, 2, 3
TABLE = {
    TokenState.MASKED: (0, [1, 1, 1, 1, 1, 0, 0, 0]),
    TokenState.UNMASKED: (1, [1, 1, 1, 0, 0, 1, 1, 1]),
}
CLIP_S = torch.tensor([0.5, 0.25])
GRID = QuantFormat(8, True, PerToken())


def context_of(state: TokenState) -> Context:
    masked_BL = torch.full((1, 1), state is TokenState.MASKED)
    return Context((torch.ones(1), torch.ones(1)), None, masked_BL)


def states_of(state: TokenState, d_m: int = 0, d_u: int = 0, clip_S: Tensor | None = None) -> Prologue:
    return Prologue(states=TokenStates(state_indices(torch.tensor([state is TokenState.MASKED])), d_m, d_u, clip_S))


def by_the_integer_path(state: TokenState) -> Tensor:
    site = SitePrologue.of(StateGate(WIDTH, D_M, D_U), torch.device("cpu"))
    x, prologue = site.split(torch.ones(1, 1, WIDTH), context_of(state), None)
    tokens = quantize_tokens(x, 8, 1.0, prologue)
    return (tokens.codes * tokens.scale).round()


GATES: dict[str, Callable[[TokenState], Tensor]] = {
    "the reference": lambda state: gate_channels(WIDTH, D_M, D_U)[BIDIRECTIONAL.index(state)],
    "StateGate": lambda state: StateGate(WIDTH, D_M, D_U)(torch.ones(1, 1, WIDTH), context_of(state)),
    "its buffer": lambda state: StateGate(WIDTH, D_M, D_U).keep_SD[BIDIRECTIONAL.index(state)],
    "the kernels' reference": lambda state: reference.quantize_rows(
        torch.ones(1, WIDTH), 8, 1.0, states_of(state, D_M, D_U)
    )[0].clamp(max=1),
    "the integer path": by_the_integer_path,
    "learning of P": lambda state: gated(torch.ones(1, WIDTH), state, (D_M, D_U)),
}


@pytest.mark.parametrize("state", BIDIRECTIONAL)
@pytest.mark.parametrize("place", GATES)
def test_each_state_uses_its_own_channels(place: str, state: TokenState) -> None:
    assert GATES[place](state).flatten().tolist() == TABLE[state][1]


def statistics_order(state: TokenState) -> int:
    ids = torch.arange(4)[None]
    statistics = SiteStatistics("site", Collect(rows=8), 1)
    batch = StateBatch(ids, torch.ones(1, 4, dtype=torch.bool), torch.tensor([0.25]))
    context = Context((ids, ids), None, torch.tensor([[True, False, False, False]]))
    statistics.update(torch.tensor([[[0.0], [1.0], [1.0], [1.0]]]), batch, context)
    assert statistics.rows().flatten().tolist() == [0.0, 1.0, 1.0, 1.0]  # rows of both come in the order of the axis
    return int(statistics.rows(state)[0])


def clip_read(scale: Tensor) -> int:
    """The index of the clip ratio that a scale was made with, the largest code of 8 bits being 127."""
    return (scale.flatten()[0] * 127).isclose(CLIP_S).nonzero().item()


def fake_quantized_clip(state: TokenState) -> int:
    largest = ActivationQuantizer(GRID, None, CLIP_S)(torch.ones(1, 1, WIDTH), context_of(state)).max()
    return clip_read(largest / 127)


def condition_read(state: TokenState) -> int:
    matrix_CNGG = torch.zeros(2, 1, WIDTH, WIDTH)
    shift_CNG = torch.arange(2.0)[:, None, None].expand(2, 1, WIDTH)
    return int(BlockAffine(matrix_CNGG, shift_CNG)(torch.ones(1, 1, WIDTH), context_of(state))[0, 0, 0])


INDICES: dict[str, Callable[[TokenState], int]] = {
    "the declared states": lambda state: BIDIRECTIONAL.index(state),
    "a forward pass": lambda state: int(context_of(state).state_BL),
    "clip ratios of fake quantization": fake_quantized_clip,
    "clip ratios of the kernels' reference": lambda state: clip_read(
        reference.quantize_rows(torch.ones(1, WIDTH), 8, 1.0, states_of(state, clip_S=CLIP_S))[1]
    ),
    "maps by state": condition_read,
    "statistics": statistics_order,
}


@pytest.mark.parametrize("state", BIDIRECTIONAL)
@pytest.mark.parametrize("place", INDICES)
def test_each_axis_has_one_order(place: str, state: TokenState) -> None:
    assert INDICES[place](state) == TABLE[state][0]
