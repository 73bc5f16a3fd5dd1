"""Bootstrap standard errors and percentile intervals of means (Efron & Tibshirani 1993); imports no torch.

Shape suffixes: N items, R resamples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Of what is resampled in pairs, over runs and items: records that are compared twice are told the same.
SEED = 0
_CHUNK = 2**22  # resampled values held in memory at a time


@dataclass(frozen=True)
class Interval:
    """A mean over n items, its bootstrap standard error, and the percentile interval [low, high]."""

    mean: float
    stderr: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedInterval(Interval):
    """The mean of a - b over pairs.

    Attributes:
        across_zero: share of resamples whose mean is zero or of the other sign than the observed one; twice it is
            a two-sided p-value in the manner of the bootstrap, and it is 1 when no difference was observed.
    """

    across_zero: float


def bootstrap(
    sample_N: ArrayLike | Sequence[float], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Resample items with replacement and return the interval of their mean.

    Raises:
        ValueError: fewer than two values, values that are not finite, no resamples, a level outside (0, 1).
    """
    numbers_N = _require_sample(sample_N, resamples, level)
    means_R = _means(numbers_N, resamples, seed)
    return Interval(float(numbers_N.mean()), standard_error(means_R), *percentiles(means_R, level), len(numbers_N))


def paired_bootstrap(
    a_N: ArrayLike | Sequence[float],
    b_N: ArrayLike | Sequence[float],
    resamples: int = 2000,
) -> PairedInterval:
    """Resample pairs with replacement and return the interval of mean(a - b).

    Raises:
        ValueError: as `bootstrap`; sides of different length.
    """
    a, b = np.asarray(a_N, dtype=np.float64), np.asarray(b_N, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"pairs need two sides of one shape, got {a.shape} and {b.shape}")
    differences_N = _require_sample(a - b, resamples)
    return _paired(float(differences_N.mean()), _means(differences_N, resamples, SEED), len(differences_N))


def crossed_bootstrap(samples: Sequence[NDArray[np.float64]], resamples: int = 2000) -> PairedInterval:
    """Return the interval of a mean over models of a mean over runs and items, runs and items both resampled.

    Models count alike and are not resampled. They are scored on the same items and their runs have the same seeds, so
    one draw of items and one of runs serves all models that have as many of them.

    Args:
        samples: one array [runs, items] a model, of pairs' differences or of plain numbers.
        resamples: number of resamples.

    Raises:
        ValueError: no models, arrays without two dimensions or two items, values that are not finite.
    """
    _require_samples(samples)
    means_R = resampled_means(samples, resamples)
    return _paired(mean_over_models(samples), means_R, sum(sample.size for sample in samples))


def average_bootstrap(tasks: Sequence[Sequence[NDArray[np.float64]]], resamples: int = 2000) -> Interval:
    """Return the interval of the average of several tasks' means, each task as in `crossed_bootstrap`.

    Every task has draws of items of its own, and all have one draw of runs.

    Args:
        tasks: one array [runs, items] a model, of each task.
        resamples: number of resamples.

    Raises:
        ValueError: no tasks.
    """
    if not tasks:
        raise ValueError("an average needs at least one task")
    means_R = np.mean([resampled_means(samples, resamples, n) for n, samples in enumerate(tasks)], axis=0)
    average = float(np.mean([mean_over_models(samples) for samples in tasks]))
    size = sum(sample.size for samples in tasks for sample in samples)
    return Interval(average, standard_error(means_R), *percentiles(means_R), size)


def resampled_means(
    samples: Sequence[NDArray[np.float64]], resamples: int = 2000, task: int = 0
) -> NDArray[np.float64]:
    """Return means [resamples] over models of means over resampled runs and items; arguments as `crossed_bootstrap`.

    Tasks of other numbers have the same draws of runs, and draws of items of their own.
    """
    runs, items = (tuple(sorted({sample.shape[axis] for sample in samples})) for axis in (0, 1))
    run_shares, item_shares = _shares(runs, items, resamples, task)
    means_R: NDArray[np.float64] = np.mean(
        [np.einsum("rn,rn->r", item_shares[s.shape[1]] @ s.T, run_shares[s.shape[0]]) for s in samples], axis=0
    )
    return means_R


def mean_over_models(samples: Sequence[NDArray[np.float64]]) -> float:
    """Return the mean over models, which count alike, of the means of their arrays."""
    return float(np.mean([sample.mean() for sample in samples]))


def standard_error(means_R: NDArray[np.float64]) -> float:
    """Return the bootstrap standard error: the standard deviation of resampled means."""
    return float(means_R.std(ddof=1))


def percentiles(means_R: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Return the ends of the percentile interval of resampled means."""
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=16)
def _shares(
    runs: tuple[int, ...], items: tuple[int, ...], resamples: int, task: int
) -> tuple[dict[int, NDArray[np.float64]], dict[int, NDArray[np.float64]]]:
    """Return, by their number, how often each run and each item is drawn, as shares [resamples, number]."""
    of_runs = np.random.default_rng(SEED)
    of_items = np.random.default_rng((SEED, task)) if task else of_runs

    def drawn(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        return rng.multinomial(count, np.full(count, 1 / count), resamples) / count

    return {n: drawn(n, of_runs) for n in runs}, {n: drawn(n, of_items) for n in items}


def _paired(observed: float, means_R: NDArray[np.float64], n: int) -> PairedInterval:
    across_zero = 1.0 if observed == 0 else float((means_R * np.sign(observed) <= 0).mean())
    return PairedInterval(observed, standard_error(means_R), *percentiles(means_R), n, across_zero)


def _require_sample(numbers: ArrayLike, resamples: int, level: float = 0.95) -> NDArray[np.float64]:
    sample_N = np.asarray(numbers, dtype=np.float64)
    if sample_N.ndim != 1 or len(sample_N) < 2:
        raise ValueError(f"a bootstrap needs two values or more in a row, got shape {sample_N.shape}")
    if not np.isfinite(sample_N).all():
        raise ValueError("a bootstrap needs finite values")
    if resamples < 2 or not 0.0 < level < 1.0:
        raise ValueError(f"resamples must be 2 or more and level inside (0, 1), got {resamples} and {level}")
    return sample_N


def _require_samples(samples: Sequence[NDArray[np.float64]]) -> None:
    if not samples:
        raise ValueError("a bootstrap needs values of at least one model")
    for sample in samples:
        if sample.ndim != 2 or sample.shape[0] < 1 or sample.shape[1] < 2 or not np.isfinite(sample).all():
            raise ValueError(f"a bootstrap needs finite values [runs, items >= 2], got shape {sample.shape}")


def _means(sample_N: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    rng, size = np.random.default_rng(seed), len(sample_N)
    rows = max(1, _CHUNK // size)
    chunks = [min(rows, resamples - begin) for begin in range(0, resamples, rows)]
    return np.concatenate([sample_N[rng.integers(0, size, (count, size))].mean(1) for count in chunks])
