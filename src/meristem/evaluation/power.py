"""How likely a verdict is at some number of items, and the number at which it is settled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from meristem.evaluation.intervals import critical_value, tango_variance, z_value
from meristem.evaluation.sample import LEAST_BLOCKS, Sample

POWER = 0.8
MOST_ITEMS = 10_000_000
MOST_DISCORDANT = 100  # expected discordant pairs up to which their counts are summed, not approximated
TAIL = 1e-7  # probability of the counts that such a sum leaves out, at each of its four edges


class Chances(NamedTuple):
    """Probability of each settled verdict."""

    passed: float
    failed: float

    @property
    def settled(self) -> float:
        return self.passed + self.failed


@dataclass(frozen=True)
class Question:
    """*pass* when the one-sided lower bound lies above ``low``, else *fail* when the upper one lies below
    ``high``, each at ``confidence``. Non-inferiority: (-margin, 0); improvement: (min_gain, min_gain)."""

    low: float
    high: float
    confidence: float = 0.95


def items_needed(sample: Sample, question: Question, power: float = POWER) -> int | None:
    """Fewest items, more than now, at which ``question`` is settled (pass or fail) with probability ``power`` if
    the truth is what ``sample`` shows; ``None`` when 10 million would not do.

    With clusters, items that share sources as these do; without bounds, never fewer than the least that is
    believed. The count is exact for binary scores with few discordant pairs, and normal theory beyond.
    """
    per_block = sample.n / len(sample.blocks)

    def settled(n: int) -> bool:
        if not sample.share and n < LEAST_BLOCKS * per_block:
            return False
        return chances(sample, question, n).settled >= power

    return first(settled, sample.n)


def chances(sample: Sample, question: Question, n: int) -> Chances:
    """Verdicts at ``n`` items if the truth is what ``sample`` shows."""
    effect = sample.design_effect
    effective = max(1, math.floor(n / effect))
    blocks = None if sample.clusters is None else max(2, math.floor(n * sample.clusters / sample.n))
    z = critical_value(2 * question.confidence - 1, blocks)
    if sample.binary:
        b, c = sample.flipped / sample.n, sample.gained / sample.n
        return binary_chances(b, c, effective, question, z)
    return graded_chances(sample.mean, sample.variance, effective, question, z, sample.share)


def binary_chances(
    flipped: float, gained: float, n: int, question: Question, z: float | None = None
) -> Chances:
    """Verdicts on ``n`` independent pairs of which shares ``flipped`` and ``gained`` are discordant in truth.

    The multinomial sum over all counts while discordant pairs are few; else the normal approximation with
    the variance of Tango's statistic under each limit, which is the sample size formula of Nam (Biometrics
    53:1422, 1997).
    """
    z = z_value(question.confidence) if z is None else z
    if n * (flipped + gained) <= MOST_DISCORDANT:
        return _summed(flipped, gained, n, question, z)
    passing = question.low + z * math.sqrt(tango_variance(flipped, gained, 1, question.low) / n)
    failing = question.high - z * math.sqrt(tango_variance(flipped, gained, 1, question.high) / n)
    mean = gained - flipped
    return _normal(mean, math.sqrt((flipped + gained - mean**2) / n), passing, failing)


def graded_chances(
    mean: float, variance: float, n: int, question: Question, z: float, share: bool = True
) -> Chances:
    """Verdicts on ``n`` independent graded differences, by the normal approximation; for shares with the
    least width that ``n`` items leave (``intervals.widened``)."""
    error = math.sqrt(variance / n)
    passing, failing = question.low + z * error, question.high - z * error
    if share:
        unseen = z * z / (n + z * z)
        passing = max(passing, (question.low + unseen) / (1 - unseen))
        failing = min(failing, (question.high - unseen) / (1 - unseen))
    return _normal(mean, error, passing, failing)


def flip_items_needed(sample: Sample, max_rate: float, confidence: float, power: float = POWER) -> int | None:
    """As ``items_needed``, for the Clopper-Pearson bounds of the negative-flip rate: binomial tails, exact."""
    rate = sample.flipped / sample.n

    def settled(n: int) -> bool:
        effective = max(1, math.floor(n / sample.flip_design_effect))
        most = _most_passing(effective, max_rate, confidence)
        least = _least_failing(effective, max_rate, confidence)
        passed = special.bdtr(most, effective, rate) if most >= 0 else 0.0
        failed = special.bdtrc(least - 1, effective, rate) if least <= effective else 0.0
        return bool(passed + failed >= power)

    return first(settled, sample.n)


def first(settled: Callable[[int], bool], start: int) -> int | None:
    """The n > ``start`` where ``settled`` turns true, found by doubling the step and bisection."""
    low, step = start, 1
    while not settled(low + step):
        low, step = low + step, 2 * step
        if low + step > MOST_ITEMS:
            return None
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return high


def _summed(flipped: float, gained: float, n: int, question: Question, z: float) -> Chances:
    b = _likely(n, flipped)
    c = _likely(n, gained)
    b, c = (grid.ravel() for grid in np.meshgrid(b, c))
    kept = b + c <= n
    b, c = b[kept], c[kept]
    counts, rates = (b, c, n - b - c), (flipped, gained, max(0.0, 1 - flipped - gained))
    ways = special.gammaln(n + 1) - sum(special.gammaln(count + 1) for count in counts)
    mass = np.exp(ways + sum(special.xlogy(count, rate) for count, rate in zip(counts, rates, strict=True)))
    passes = score_statistic(b, c, n, question.low) > z
    fails = ~passes & (score_statistic(b, c, n, question.high) < -z)
    return Chances(float(mass[passes].sum()), float(mass[fails].sum()))


def _likely(n: int, rate: float) -> np.ndarray:
    edges = stats.binom.ppf([TAIL, 1 - TAIL], n, rate)
    return np.arange(max(0, int(edges[0])), int(edges[1]) + 1)


def score_statistic(b: np.ndarray, c: np.ndarray, n: int, delta: float) -> np.ndarray:
    """Tango's Z(D) for arrays of counts; the bounds of the interval clear D where it passes the quantile."""
    second = (2 * n - c + b) * delta - b - c
    root = np.sqrt(np.maximum(0.0, second**2 + 8 * n * b * delta * (1 - delta)))
    variance = np.maximum(0.0, n * ((root - second) / (2 * n) + delta * (1 - delta)))
    distance = c - b - n * delta
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0, 0.0, distance / np.sqrt(variance))


def _normal(mean: float, error: float, passing: float, failing: float) -> Chances:
    """An estimate N(mean, error^2) passes above ``passing``, else fails below ``failing``."""
    if error == 0:
        return Chances(float(mean > passing), float(mean < failing and not mean > passing))
    cdf = NormalDist(mean, error).cdf
    passed = 1 - cdf(passing)
    return Chances(passed, min(cdf(failing), 1 - passed))


def _most_passing(n: int, max_rate: float, confidence: float) -> int:
    """Most flips of n whose upper bound stays at or below ``max_rate``: P(X <= k | max_rate) <= 1 - confidence."""
    found = int(stats.binom.ppf(1 - confidence, n, max_rate))
    return found if special.bdtr(found, n, max_rate) <= 1 - confidence else found - 1


def _least_failing(n: int, max_rate: float, confidence: float) -> int:
    """Fewest flips of n whose lower bound lies above ``max_rate``: P(X >= k | max_rate) < 1 - confidence."""
    found = int(stats.binom.isf(1 - confidence, n, max_rate)) + 1
    return found if special.bdtrc(found - 1, n, max_rate) < 1 - confidence else found + 1
