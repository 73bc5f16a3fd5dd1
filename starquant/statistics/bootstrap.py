"""Bootstrap standard errors and percentile intervals of means (Efron & Tibshirani 1993); imports no torch.

Shape suffixes: N items, R resamples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    values_N: ArrayLike | Sequence[float], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Resample items with replacement and return the interval of their mean.

    Raises:
        ValueError: fewer than two values, values that are not finite, no resamples, a level outside (0, 1).
    """
    values = _checked(values_N, resamples, level)
    return Interval(*_summary(values, _means(values, resamples, seed), level), len(values))


def paired_bootstrap(
    a_N: ArrayLike | Sequence[float],
    b_N: ArrayLike | Sequence[float],
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedInterval:
    """Resample pairs with replacement and return the interval of mean(a - b).

    Raises:
        ValueError: as `bootstrap`; sides of different length.
    """
    a, b = np.asarray(a_N, dtype=np.float64), np.asarray(b_N, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"pairs need two sides of one shape, got {a.shape} and {b.shape}")
    values = _checked(a - b, resamples, level)
    means = _means(values, resamples, seed)
    observed = values.mean()
    crossed = np.ones(()) if observed == 0 else (means * np.sign(observed) <= 0).mean()
    return PairedInterval(*_summary(values, means, level), len(values), float(crossed))


def crossed_bootstrap(
    differences: Sequence[NDArray[np.float64]], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> PairedInterval:
    """Return the interval of a mean over models of a mean over runs and items, runs and items both resampled.

    Models count alike and are not resampled. They are scored on the same items and their runs have the same seeds, so
    one draw of items and one of runs serves all models that have as many of them.

    Args:
        differences: one array [runs, items] a model, each value a pair's difference (or a plain value).
        resamples: number of resamples.
        seed: of the resampling.
        level: of the interval.

    Raises:
        ValueError: no models, arrays without two dimensions or two items, values that are not finite.
    """
    if not differences:
        raise ValueError("a bootstrap needs values of at least one model")
    for values in differences:
        if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2 or not np.isfinite(values).all():
            raise ValueError(f"a bootstrap needs finite values [runs, items >= 2], got shape {values.shape}")
    means = resampled_means(differences, resamples, seed)
    observed = float(np.mean([values.mean() for values in differences]))
    crossed = 1.0 if observed == 0 else float((means * np.sign(observed) <= 0).mean())
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    n = sum(values.size for values in differences)
    return PairedInterval(observed, float(means.std(ddof=1)), float(low), float(high), n, crossed)


def resampled_means(
    values: Sequence[NDArray[np.float64]], resamples: int = 2000, seed: int = 0, task: int = 0
) -> NDArray[np.float64]:
    """Return means [resamples] over models of means over resampled runs and items; arguments as `crossed_bootstrap`.

    Tasks of other numbers have the same draws of runs, and draws of items of their own.
    """
    runs, items = (tuple(sorted({v.shape[axis] for v in values})) for axis in (0, 1))
    run_shares, item_shares = _shares(runs, items, resamples, seed, task)
    means: NDArray[np.float64] = np.mean(
        [np.einsum("rn,rn->r", item_shares[v.shape[1]] @ v.T, run_shares[v.shape[0]]) for v in values], axis=0
    )
    return means


@functools.lru_cache(maxsize=16)
def _shares(
    runs: tuple[int, ...], items: tuple[int, ...], resamples: int, seed: int, task: int
) -> tuple[dict[int, NDArray[np.float64]], dict[int, NDArray[np.float64]]]:
    """Return, by their number, how often each run and each item is drawn, as shares [resamples, number]."""
    of_runs = np.random.default_rng(seed)
    of_items = np.random.default_rng((seed, task)) if task else of_runs

    def drawn(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        return rng.multinomial(count, np.full(count, 1 / count), resamples) / count

    return {n: drawn(n, of_runs) for n in runs}, {n: drawn(n, of_items) for n in items}


def _checked(values: ArrayLike, resamples: int, level: float) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"a bootstrap needs two values or more in a row, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("a bootstrap needs finite values")
    if resamples < 2 or not 0.0 < level < 1.0:
        raise ValueError(f"resamples must be 2 or more and level inside (0, 1), got {resamples} and {level}")
    return array


def _means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    rng, size = np.random.default_rng(seed), len(values)
    rows = max(1, _CHUNK // size)
    chunks = [min(rows, resamples - begin) for begin in range(0, resamples, rows)]
    return np.concatenate([values[rng.integers(0, size, (count, size))].mean(1) for count in chunks])


def _summary(
    values: NDArray[np.float64], means: NDArray[np.float64], level: float
) -> tuple[float, float, float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(means.std(ddof=1)), float(low), float(high)
