"""Intervals and tests for paired results. Pure functions of counts or differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from scipy import stats

Interval = tuple[float, float]
RESAMPLES = 4999
BOOTSTRAP_CELLS = 4_000_000  # elements drawn at once


def z_value(probability: float) -> float:
    """Standard normal quantile."""
    return NormalDist().inv_cdf(probability)


def mcnemar_p(flipped: int, gained: int) -> float:
    """Exact two-sided McNemar p-value: Binomial(flipped + gained, 1/2) at ``flipped``; 1 without either."""
    if flipped + gained == 0:
        return 1.0
    return float(stats.binomtest(flipped, flipped + gained, 0.5).pvalue)


def tango_interval(flipped: int, gained: int, n: int, confidence: float) -> Interval:
    """Tango's score interval for a paired difference of proportions, new minus old.

    With c = gained (old wrong, new right) and b = flipped (old right, new wrong) of n pairs::

        Z(D) = (c - b - n D) / sqrt(n (2 q(D) + D (1 - D)))
        q(D) = (sqrt(B^2 - 4 A C) - B) / (2 A)        the MLE of P(old right, new wrong) given D
        A = 2 n,   B = -c - b + (2 n - c + b) D,   C = -b D (1 - D)

    and the interval is all D with |Z(D)| <= z. Without discordant pairs it is
    (-z^2/(n + z^2), z^2/(n + z^2)), not a point, which is why gates use it: agreement on a few items
    proves little. Source: T. Tango, Statistics in Medicine 17 (1998), 891-908.

    ``confidence`` is two-sided; a one-sided bound at level p is an end of the interval at 2p - 1.
    """
    z = z_value((1 + confidence) / 2)
    estimate = (gained - flipped) / n

    def inside(delta: float) -> bool:
        return abs(gained - flipped - n * delta) <= z * math.sqrt(_tango_variance(flipped, gained, n, delta))

    return _edge(inside, estimate, -1.0), _edge(inside, estimate, 1.0)


def _tango_variance(b: int, c: int, n: int, delta: float) -> float:
    """n (2 q + D (1 - D)), the variance of c - b under the difference D."""
    first = 2.0 * n
    second = -c - b + (2 * n - c + b) * delta
    third = -b * delta * (1 - delta)
    q = (math.sqrt(max(0.0, second * second - 4 * first * third)) - second) / (2 * first)
    return max(0.0, n * (2 * q + delta * (1 - delta)))


def _edge(inside: Callable[[float], bool], start: float, end: float) -> float:
    """Bisection for where ``inside`` turns false between ``start`` (true) and ``end``."""
    if inside(end):
        return end
    for _ in range(60):
        middle = (start + end) / 2
        start, end = (middle, end) if inside(middle) else (start, middle)
    return (start + end) / 2


def clopper_pearson(hits: int, n: int, confidence: float) -> Interval:
    """Exact two-sided interval of a proportion; one-sided at level p: an end of the one at 2p - 1."""
    interval = stats.binomtest(hits, n).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def bootstrap_interval(differences: Sequence[float], confidence: float, seed: int) -> Interval:
    """Paired BCa bootstrap interval of the mean difference (Efron 1987), seeded.

    Percentile where BCa is undefined; a point when all differences are equal.
    """
    values = np.asarray(differences, dtype=float)
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"):
            found = stats.bootstrap(
                (values,),
                np.mean,
                n_resamples=RESAMPLES,
                batch=max(1, BOOTSTRAP_CELLS // len(values)),
                vectorized=True,
                confidence_level=confidence,
                method=method,
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            return float(found.low), float(found.high)
    raise AssertionError("a percentile interval of finite differences is finite")
