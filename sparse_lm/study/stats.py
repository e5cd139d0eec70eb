"""Statistics over few seeds: means with errors, intervals of paired differences, and what could have been seen at all.

A difference is paired: two variants with the same seed see the same data in the same order. Its interval is a bootstrap
over seeds, by enumeration of all resamples where these are few. With three seeds no interval is better than from the
smallest to the largest difference, which lies on one side of 0 by luck alone once in eight times: `luck` says so beside
every verdict, and `smallest_detectable` which difference the seeds could have shown.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
POWER = 0.8
MOST_RESAMPLES = 30_000  # distinct resamples that are enumerated; beyond, as many are drawn


@dataclasses.dataclass(frozen=True)
class Summary:
    """mean, and standard error of the mean (None for fewer than two values) of `n` values."""

    mean: float
    standard_error: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Interval:
    """Ends of an interval for a mean. exact: all resamples were enumerated, none drawn."""

    low: float
    high: float
    exact: bool


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard error. Raises `ValueError` without values, or when one is not finite."""
    _check(values, 1)
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Summary(float(np.mean(values)), error, n)


def bootstrap_interval(differences: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean difference over seeds.

    The tails are those of the expanded percentile interval (Hesterberg 2015, "What teachers should know about the
    bootstrap", section 4.3), without which intervals of few values are too narrow; they cannot widen beyond the
    smallest and the largest value. Raises `ValueError` for fewer than two values.
    """
    _check(differences, 2)
    values = np.sort(np.asarray(differences, float))
    n = len(values)
    quantile = scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    tail = float(scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * quantile))
    exact = math.comb(2 * n - 1, n) <= MOST_RESAMPLES
    means, weights = _all_resamples(values) if exact else _drawn_resamples(values, seed)
    order = np.argsort(means, kind="stable")
    means, weights = means[order], weights[order]
    low = means[min(np.searchsorted(np.cumsum(weights), tail, side="right"), len(means) - 1)]
    high = means[::-1][min(np.searchsorted(np.cumsum(weights[::-1]), tail, side="right"), len(means) - 1)]
    return Interval(float(low), float(high), exact)


def _all_resamples(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and probabilities of the distinct resamples: multisets, weighted by their permutations."""
    n = len(values)
    chosen = np.array(list(itertools.combinations_with_replacement(range(n), n)))
    counts = (chosen[:, :, None] == np.arange(n)).sum(axis=1)
    factorial = np.array([math.factorial(i) for i in range(n + 1)], float)
    weights = math.factorial(n) / factorial[counts].prod(axis=1) / float(n) ** n
    return values[chosen].mean(axis=1), weights


def _drawn_resamples(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.random.default_rng(seed).integers(len(values), size=(MOST_RESAMPLES, len(values)))
    return values[chosen].mean(axis=1), np.full(MOST_RESAMPLES, 1 / MOST_RESAMPLES)


def t_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's interval, for normal differences: wider than any bootstrap when there are few. Errors as above."""
    _check(differences, 2)
    found = summary(differences)
    assert found.standard_error is not None
    reach = float(scipy.stats.t.ppf((1 + confidence) / 2, found.n - 1)) * found.standard_error
    return Interval(found.mean - reach, found.mean + reach, True)


def smallest_detectable(differences: Sequence[float], confidence: float = CONFIDENCE, power: float = POWER) -> float:
    """The true mean difference that a t test of so many pairs, spread as these are, finds with probability `power`.

    (t_confidence + t_power) standard errors, n - 1 degrees of freedom. Raises `ValueError` for fewer than two values.
    """
    _check(differences, 2)
    found = summary(differences)
    assert found.standard_error is not None
    quantiles = scipy.stats.t.ppf([(1 + confidence) / 2, power], found.n - 1)
    return float(quantiles.sum()) * found.standard_error


def luck(n: int, confidence: float = CONFIDENCE) -> float:
    """About the chance that a comparison of n pairs is called shown although the true mean is at the end of its range.

    With few pairs the interval spans all differences, and they fall on one side together once in 2**n times.
    """
    return 1.0 if n < 2 else max(0.5**n, (1 - confidence) / 2)


def _check(values: Sequence[float], least: int) -> None:
    if len(values) < least:
        raise ValueError(f"{len(values)} values: need at least {least}, run more seeds")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values {list(values)}: all must be finite; leave failed runs out")
