"""Intervals for paired results. Pure functions of counts or differences; ``significance.py`` has the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from scipy import special, stats

Interval = tuple[float, float]
RESAMPLES = 4999
BOOTSTRAP_CELLS = 4_000_000  # elements drawn at once
MOST_JACKKNIFE = 10_000  # BCa's jackknife takes n^2 operations, and its corrections vanish as 1/n
MOST_CONFIDENCE = 1 - 1e-9


def z_value(probability: float) -> float:
    """Standard normal quantile."""
    return NormalDist().inv_cdf(probability)


def critical_value(confidence: float, blocks: int | None = None) -> float:
    """Two-sided critical value: normal, or Student's t with ``blocks - 1`` degrees of freedom (infinite for
    one block), which is what a variance estimated from that many clusters calls for."""
    if blocks is None:
        return z_value((1 + confidence) / 2)
    return float(special.stdtrit(blocks - 1, (1 + confidence) / 2)) if blocks > 1 else math.inf


def tango_interval(
    flipped: float, gained: float, n: float, confidence: float, blocks: int | None = None
) -> Interval:
    """Tango's score interval for a paired difference of proportions, new minus old.

    With c = gained (old wrong, new right) and b = flipped (old right, new wrong) of n pairs::

        Z(D) = (c - b - n D) / sqrt(n (2 q(D) + D (1 - D)))
        q(D) = (sqrt(B^2 - 4 A C) - B) / (2 A)        the MLE of P(old right, new wrong) given D
        A = 2 n,   B = -c - b + (2 n - c + b) D,   C = -b D (1 - D)

    and the interval is all D with |Z(D)| <= z. Without discordant pairs it is
    (-z^2/(n + z^2), z^2/(n + z^2)), not a point, which is why gates use it: agreement on a few items
    proves little. Source: T. Tango, Statistics in Medicine 17 (1998), 891-908.

    ``confidence`` is two-sided; a one-sided bound at level p is an end of the interval at 2p - 1. Counts may
    be fractions (effective counts under a design effect); ``blocks`` then gives Student's t for z.
    """
    z = critical_value(confidence, blocks)
    if math.isinf(z):
        return -1.0, 1.0
    estimate = (gained - flipped) / n

    def inside(delta: float) -> bool:
        return abs(gained - flipped - n * delta) <= z * math.sqrt(tango_variance(flipped, gained, n, delta))

    return _edge(inside, estimate, -1.0), _edge(inside, estimate, 1.0)


def tango_variance(b: float, c: float, n: float, delta: float) -> float:
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


def clopper_pearson(hits: float, n: float, confidence: float) -> Interval:
    """Exact two-sided interval of a proportion; one-sided at level p: an end of the one at 2p - 1.

    Fractions are allowed: the beta quantiles at effective counts are the interval of Korn & Graubard (1998).
    """
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(hits, n - hits + 1, tail)) if hits > 0 else 0.0
    high = float(special.betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high


def bootstrap_interval(
    sums: Sequence[float], confidence: float, seed: int, sizes: Sequence[int] | None = None
) -> Interval:
    """Paired BCa bootstrap interval (Efron 1987) of the mean difference, seeded.

    ``sums``: a difference per item; with ``sizes``, the summed differences of each cluster, which are then
    what is drawn, and the estimate is sum(sums) / sum(sizes). Percentile where BCa is undefined or the
    sample large; a point when every item changed by the same amount.
    """
    values = np.asarray(sums, dtype=float)
    weights = np.ones(len(values)) if sizes is None else np.asarray(sizes, dtype=float)
    estimate = math.fsum(values) / math.fsum(weights)
    if np.ptp(values / weights) == 0:
        return estimate, estimate
    clustered = sizes is not None
    for method in ("BCa", "percentile") if len(values) <= MOST_JACKKNIFE else ("percentile",):
        with np.errstate(all="ignore"):
            found = stats.bootstrap(
                (values, weights) if clustered else (values,),
                _ratio if clustered else np.mean,
                n_resamples=RESAMPLES,
                batch=max(1, BOOTSTRAP_CELLS // len(values)),
                vectorized=True,
                paired=clustered,
                confidence_level=confidence,
                method=method,
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            return float(found.low), float(found.high)
    raise AssertionError("a percentile interval of finite differences is finite")


def expanded(confidence: float, blocks: int) -> float:
    """The nominal level at which a bootstrap of ``blocks`` draws covers ``confidence`` when they are few.

    2 Phi(sqrt(m / (m - 1)) t) - 1 with t the critical value of Student's t: the bootstrap lacks the factor
    m / (m - 1) of the variance and the tails of t. Source: Hesterberg, The American Statistician 69 (2015).
    """
    t = critical_value(confidence, blocks)
    z = math.sqrt(blocks / (blocks - 1)) * t if blocks > 1 else math.inf
    return min(MOST_CONFIDENCE, 2 * NormalDist().cdf(z) - 1)


def widened(interval: Interval, estimate: float, n: float, z: float) -> Interval:
    """``interval`` of a mean difference of shares, at least as wide as what ``n`` items can rule out.

    A share p = z^2 / (n + z^2) of all items may be of a kind that ``n`` items did not show (Wilson's score
    bound for 0 of n), and such an item may lose or gain everything: the ends reach at least to
    (1 - p) estimate -+ p. At estimate 0 these are the ends of Tango's interval without discordant pairs.
    """
    if math.isinf(z):
        return -1.0, 1.0
    unseen = z * z / (n + z * z)
    kept = (1 - unseen) * estimate
    return min(interval[0], kept - unseen), max(interval[1], kept + unseen)


def _ratio(sums: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(sums.sum(axis=axis) / sizes.sum(axis=axis))
