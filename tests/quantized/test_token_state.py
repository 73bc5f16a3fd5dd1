"""Token states: what each forward pass knows of them, and what acts on them, against loops over tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from starquant.models.context import Context, bidirectional, running_positions
from starquant.models.layers import Rotary
from starquant.numerics import PerToken, QuantFormat, fake_quantize
from starquant.quantized import ActivationQuantizer, BlockAffine, SiteTransform, StateGate
from starquant.quantized.state_transforms import bin_of_context

MASK = 9


def context_of(ids: list[list[int]], visible: list[list[int]] | None = None) -> Context:
    ids_BL, visible_BL = torch.tensor(ids), None if visible is None else torch.tensor(visible).bool()
    rotary = Rotary(4, 1e4)(running_positions(ids_BL, visible_BL))
    return Context(rotary, bidirectional(visible_BL), ids_BL == MASK, visible_BL)


# Contexts


def test_states_are_read_off_the_ids_and_shares_count_visible_tokens() -> None:
    ids = [[1, MASK, 3, MASK, 5], [MASK, MASK, 3, 4, MASK], [MASK, MASK, 9, 9, 9], [1, 2, 3, 4, 5]]
    states = [[False, True, False, True, False], [True, True, False, False, True], [True] * 5, [False] * 5]
    assert context_of(ids).masked_BL.tolist() == states
    assert context_of(ids).mask_ratio_B.tolist() == pytest.approx([2 / 5, 3 / 5, 1.0, 0.0])
    left = context_of(ids, [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    assert left.mask_ratio_B.tolist() == pytest.approx([1 / 3, 2 / 4, 1.0, 0.0])
    right = context_of(ids, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    assert right.mask_ratio_B.tolist() == pytest.approx([1 / 3, 2 / 4, 1.0, 0.0])
    assert left.masked_BL.tolist() == right.masked_BL.tolist() == states
    assert left.mask_ratio_B.dtype == right.mask_ratio_B.dtype == context_of(ids).mask_ratio_B.dtype == torch.float32


def test_a_row_of_padding_has_a_share_of_zero_not_nan() -> None:
    found = context_of([[MASK, MASK], [1, MASK]], [[0, 0], [1, 1]]).mask_ratio_B
    assert found.tolist() == [0.0, 0.5]


def test_a_mask_of_ones_is_no_mask() -> None:
    ids = [[1, MASK, MASK, MASK]]
    assert context_of(ids, [[1, 1, 1, 1]]).mask is None
    assert context_of(ids, [[1, 1, 1, 1]]).mask_ratio_B.tolist() == context_of(ids).mask_ratio_B.tolist() == [0.75]


@pytest.mark.parametrize("bins", [1, 2, 3, 4, 5, 7, 10, 13, 16])
@pytest.mark.parametrize("padding", [0, 3])
def test_bins_are_half_open_in_exact_arithmetic(bins: int, padding: int) -> None:
    for length in (1, 2, 3, 10, 13, 24, 49, 60, 97):
        ids = [[MASK] * padding + [MASK] * k + [1] * (length - k) for k in range(length + 1)]
        visible = [[0] * padding + [1] * length for _ in ids] if padding else None
        expected = [max(math.ceil(Fraction(k, length) * bins) - 1, 0) for k in range(length + 1)]
        assert bin_of_context(context_of(ids, visible), bins).tolist() == expected, length


# Modules


def test_a_gate_keeps_the_shared_channels_and_those_of_the_state() -> None:
    context, x = context_of([[1, MASK, MASK], [MASK, 2, 3]]), torch.randn(2, 3, 8)
    before, got = x.clone(), StateGate(8, 2, 3)(x, context)
    for b in range(2):
        for t in range(3):
            masked = (b, t) in {(0, 1), (0, 2), (1, 0)}
            kept = {0, 1, 2} | ({3, 4} if masked else {5, 6, 7})
            for channel in range(8):
                assert got[b, t, channel] == (x[b, t, channel] if channel in kept else 0.0), (b, t, channel)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("masked", "unmasked", "zeros"), [(0, 0, 0), (0, 3, 3 * 2), (3, 0, 3), (4, 4, 4 + 4 * 2)])
def test_a_gate_of_one_state_leaves_the_other_whole(masked: int, unmasked: int, zeros: int) -> None:
    """Two masked tokens lose the unmasked channels, one other token the masked ones."""
    got = StateGate(8, masked, unmasked)(torch.ones(1, 3, 8), context_of([[MASK, 1, MASK]]))
    assert int((got == 0).sum()) == zeros


@pytest.mark.parametrize("bins", [None, 1, 2, 5])
@pytest.mark.parametrize("padding", [0, 1])
def test_block_affine_against_a_loop_over_tokens(bins: int | None, padding: int) -> None:
    """None: one map for all; 1 bin: one a state; else bin k and state s at 2 k + s, masked first."""
    conditions = 1 if bins is None else 2 * bins
    torch.manual_seed(3)
    matrix, shift, z = torch.randn(conditions, 3, 4, 4), torch.randn(conditions, 3, 4), torch.randn(6, 6, 12)
    ids = [[MASK] * padding + [MASK if t < k else 1 for t in range(6 - padding)] for k in range(6)]
    visible = [[0] * padding + [1] * (6 - padding)] * 6
    got = BlockAffine(matrix, shift)(z, context_of(ids, visible))
    seen = set()
    for b in range(6):
        share = Fraction(min(b, 6 - padding), 6 - padding)
        for t in range(6):
            state = 0 if ids[b][t] == MASK else 1
            k = 0 if bins is None else max(math.ceil(share * bins) - 1, 0)
            condition = 0 if bins is None else 2 * k + state
            seen.add(condition)
            for n in range(3):
                expected = matrix[condition, n] @ z[b, t, 4 * n : 4 * n + 4] + shift[condition, n]
                assert torch.allclose(got[b, t, 4 * n : 4 * n + 4], expected, atol=1e-5), (b, t, n)
    assert len(seen) >= min(conditions, 5)


@pytest.mark.parametrize("conditions", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_identity_map_is_no_change_in_the_dtype_of_the_input(conditions: int, dtype: torch.dtype) -> None:
    affine = BlockAffine(torch.eye(4).expand(conditions, 2, 4, 4), torch.zeros(conditions, 2, 4))
    z = torch.randn(2, 3, 8).to(dtype)
    got = affine(z, context_of([[1, MASK, MASK], [MASK, 2, 3]]))
    assert got.dtype == dtype
    assert torch.equal(got, z)


def test_block_affine_computes_in_float32() -> None:
    matrix, z = torch.full((1, 1, 4, 4), 1.001, dtype=torch.float64), torch.tensor([[[256.0, -255.0, 1.0, 1.0]]])
    got = BlockAffine(matrix, torch.zeros(1, 1, 4).double())(z.bfloat16())
    assert got.tolist() == [[[3.0] * 4]]  # 3.003; bfloat16 matrices would be 1.0, half sums would lose the ones
    precise = BlockAffine(matrix * 100, torch.zeros(1, 1, 4))(z.bfloat16())
    assert precise.tolist() == torch.tensor([[[300.3] * 4]]).bfloat16().tolist()


class Step(nn.Module):
    """x -> a x + b, and who was called with which context."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b, self.contexts = a, b, []

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self.contexts.append(context)
        return self.a * x + self.b

    def __str__(self) -> str:
        return f"{self.a:g} x + {self.b:g}"


def test_a_site_corrects_then_transforms_then_gates() -> None:
    correction, exact, gate = Step(2, 1), Step(3, 5), Step(7, 11)
    context, x = context_of([[1, MASK]]), torch.ones(1, 2, 4)
    site = SiteTransform(exact, correction, gate)
    assert site(x, context).unique().tolist() == [((1 * 2 + 1) * 3 + 5) * 7 + 11]
    assert all(step.contexts == [context] for step in (correction, exact, gate))
    assert str(site) == "2 x + 1, 3 x + 5, 7 x + 11"
    assert SiteTransform(None, correction, gate)(x, context).unique().tolist() == [(1 * 2 + 1) * 7 + 11]
    assert SiteTransform(exact, gate=gate)(x, context).unique().tolist() == [(1 * 3 + 5) * 7 + 11]
    assert SiteTransform(None)(x, context) is x


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_state_is_clipped_by_its_own_ratio(symmetric: bool) -> None:
    """On top of the format's ratio, behind the transform."""
    ids = [[1, MASK, 3, MASK], [MASK, MASK, 2, 1]]
    x = torch.randn(2, 4, 16)
    fmt = QuantFormat(4, symmetric, PerToken(), 0.9)
    site = ActivationQuantizer(fmt, StateGate(16, 4, 4), torch.tensor([0.5, 0.75]))
    got = site(x, context_of(ids))
    for b, row in enumerate(ids):
        for t, token in enumerate(row):
            ratio, dropped = (0.5, slice(12, 16)) if token == MASK else (0.75, slice(8, 12))
            gated = x[b, t].clone()
            gated[dropped] = 0.0
            expected = fake_quantize(gated[None], QuantFormat(4, symmetric, PerToken(), 0.9 * ratio))[0]
            assert torch.allclose(got[b, t], expected, atol=1e-5), (b, t)
    plain = ActivationQuantizer(fmt, StateGate(16, 4, 4))(x, context_of(ids))
    assert not torch.allclose(got, plain, atol=1e-2)
