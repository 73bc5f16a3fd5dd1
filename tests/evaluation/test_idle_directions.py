"""Directions below the quantization noise, of states whose spectra are known."""

from __future__ import annotations

import pytest
import torch

from starquant.calibration.batches import StateBatch
from starquant.calibration.site_statistics import Collect, SiteStatistics
from starquant.evaluation import activations
from starquant.evaluation.activations import measure
from starquant.evaluation.idle_directions import Spectrum, idle_directions, rounding_noise
from starquant.models.context import Context
from starquant.numerics import BIDIRECTIONAL, random_rotation
from tests.support.models import fresh
from tests.support.states import states_of

WIDTH, TOKENS = 64, 4000


def statistics_of(masked: range, unmasked: range) -> SiteStatistics:
    """Tokens of either state that live in some of the directions of a random basis."""
    generator = torch.Generator().manual_seed(0)
    basis_DD = random_rotation("orthogonal", WIDTH, seed=1).apply(torch.eye(WIDTH, dtype=torch.float64))
    state_BL = (torch.arange(2 * TOKENS) % 2 == 0)[None]
    keep = torch.zeros(2, WIDTH, dtype=torch.float64)
    keep[1, masked], keep[0, unmasked] = 1.0, 1.0
    x_LD = torch.randn(2 * TOKENS, WIDTH, generator=generator, dtype=torch.float64) * keep[state_BL[0].long()]
    found = SiteStatistics("here", Collect(rows=512, second_moment="state"), bins=1)
    batch = StateBatch(torch.zeros_like(state_BL, dtype=torch.long), torch.ones_like(state_BL), torch.tensor([0.5]))
    found.update((x_LD @ basis_DD)[None], batch, Context((torch.empty(0), torch.empty(0)), None, state_BL))
    return found


@pytest.mark.parametrize(
    ("masked", "unmasked", "expected"),
    [
        (range(16), range(64), (48, 0, 0)),
        (range(64), range(16), (0, 48, 0)),
        (range(16), range(16), (0, 0, 48)),
        (range(32), range(16, 48), (16, 16, 16)),
        (range(64), range(64), (0, 0, 0)),
    ],
)
def test_counts(masked: range, unmasked: range, expected: tuple[int, int, int]) -> None:
    statistics = statistics_of(masked, unmasked)
    counts = idle_directions(statistics, {state.value: Spectrum.of(statistics, state) for state in BIDIRECTIONAL})
    assert [counts[name] for name in ("masked", "unmasked", "both")] == pytest.approx(expected, abs=0.01)


def test_noise_is_that_of_rounding() -> None:
    """Rounding errors of a fine grid are uniform: s^2 / 12."""
    from starquant.numerics import PerToken, QuantFormat, fake_quantize

    x_ND = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(2))
    error = (fake_quantize(x_ND, QuantFormat(4, True, PerToken())) - x_ND).square().mean()
    assert rounding_noise(x_ND) == pytest.approx(float(error), rel=0.1)


def test_sites_that_are_too_wide_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llada_gqa")
    rows = measure(model, states_of(model))
    monkeypatch.setattr(activations, "WIDEST", 100)
    for before, row in zip(rows, measure(model, states_of(model)), strict=True):
        narrow = row["width"] <= 100
        assert (row["idle_directions"] is not None) == (row["overlap"] is not None) == narrow
        assert before["idle_directions"] is not None
