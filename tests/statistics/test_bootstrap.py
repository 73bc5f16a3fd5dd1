"""Bootstrap intervals against closed forms and by simulation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from starquant.statistics import bootstrap as module
from starquant.statistics.bootstrap import bootstrap, paired_bootstrap


def test_standard_error_and_interval_of_a_large_sample_have_their_closed_forms() -> None:
    values = np.random.default_rng(0).exponential(size=5000)
    found = bootstrap(values, resamples=4000, seed=1)
    stderr = values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(stderr, rel=0.04)
    assert found.low == pytest.approx(values.mean() - 1.96 * stderr, abs=0.15 * stderr)
    assert found.high == pytest.approx(values.mean() + 1.96 * stderr, abs=0.15 * stderr)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    for level in (0.8, 0.95):
        found = [bootstrap(rng.normal(3, 2, 60), 300, seed, level) for seed in range(400)]
        covered = np.mean([interval.low <= 3 <= interval.high for interval in found])
        assert covered == pytest.approx(level, abs=0.04)


def test_all_resamples_of_two_values() -> None:
    """Means 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4."""
    found = bootstrap([0.0, 1.0], resamples=20_000)
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.0, 1.0, 2)
    assert found.stderr == pytest.approx(np.sqrt(1 / 8), rel=0.02)


def test_seed_and_memory_chunks(monkeypatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    first = bootstrap(values, 500, seed=4)
    assert first == bootstrap(values, 500, seed=4)
    assert first != bootstrap(values, 500, seed=5)
    monkeypatch.setattr(module, "_CHUNK", 50 * 7)
    assert bootstrap(values, 500, seed=4).stderr == pytest.approx(first.stderr, rel=0.2)


def test_pairs_take_out_what_items_share() -> None:
    rng = np.random.default_rng(0)
    difficulty, difference = rng.normal(0, 10, 300), rng.normal(0.5, 1, 300)
    found = paired_bootstrap(difficulty + difference, difficulty)
    plain = bootstrap(difference)
    assert (found.mean, found.stderr, found.low, found.high) == pytest.approx(
        (plain.mean, plain.stderr, plain.low, plain.high)
    )
    assert found.stderr < 0.1 < bootstrap(difficulty).stderr
    assert found.across_zero == 0.0


def test_share_of_resamples_across_zero() -> None:
    zero = np.zeros(2)
    # means of resamples of (-1, 3): -1 (1/4), 1 (1/2), 3 (1/4)
    assert paired_bootstrap([-1, 3], zero, 20_000).across_zero == pytest.approx(0.25, abs=0.02)
    assert paired_bootstrap(zero, [-1, 3], 20_000).across_zero == pytest.approx(0.25, abs=0.02)
    # of (0, 1): exactly zero in a quarter
    assert paired_bootstrap([0, 1], zero, 20_000).across_zero == pytest.approx(0.25, abs=0.02)
    assert paired_bootstrap([1, -1], zero).across_zero == 1.0


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0]]])
def test_bad_values_are_refused(values) -> None:
    with pytest.raises(ValueError, match="a bootstrap needs"):
        bootstrap(values)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="resamples"):
        bootstrap([1.0, 2.0], resamples=1)
    with pytest.raises(ValueError, match="level"):
        bootstrap([1.0, 2.0], level=1.0)
    with pytest.raises(ValueError, match="one shape"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0])


def test_tables_do_not_load_torch() -> None:
    check = "import sys, starquant.statistics.bootstrap, starquant.reports.paired; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
