"""The interval of an average of tasks' means."""

from __future__ import annotations

import numpy as np
import pytest

from starquant.statistics.bootstrap import average_bootstrap, crossed_bootstrap, percentiles, standard_error


def test_of_one_task_it_is_the_task_s_own() -> None:
    samples = [np.random.default_rng(seed).normal(size=(2, 30)) for seed in range(3)]
    average, own = average_bootstrap([samples]), crossed_bootstrap(samples)
    assert (average.mean, average.stderr, average.low, average.high) == (own.mean, own.stderr, own.low, own.high)
    assert average.n == 180


def test_tasks_count_alike_and_their_items_are_drawn_apart() -> None:
    """Two independent tasks with one standard error each: that of the average is smaller by the square root of two."""
    sample = np.random.default_rng(0).normal(size=(1, 400))
    one, two = average_bootstrap([[sample]], 20_000), average_bootstrap([[sample], [sample + 4]], 20_000)
    assert two.mean == pytest.approx(one.mean + 2)
    assert two.stderr == pytest.approx(one.stderr / 2**0.5, rel=0.03)


def test_no_task_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        average_bootstrap([])


def test_error_and_percentiles_of_known_means() -> None:
    means = np.arange(101.0)
    assert standard_error(means) == pytest.approx(means.std(ddof=1))
    assert percentiles(means, 0.9) == pytest.approx((5.0, 95.0))
