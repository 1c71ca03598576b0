"""Intervals against published values, SciPy, statsmodels, brute force and simulation."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from meristem.evaluation.intervals import (
    bootstrap_interval,
    clopper_pearson,
    critical_value,
    expanded,
    tango_interval,
    widened,
)


@pytest.mark.parametrize(
    ("flipped", "gained", "n", "confidence", "expected", "places"),
    [
        # Bentur 2009 in Fagerland, Lydersen & Laake, BMC Med Res Methodol 14:133 (2014), signs turned
        (7, 1, 21, 0.95, (-0.517, -0.026), 5e-4),
        (25, 28, 618, 0.90, (-0.0148, 0.0247), 5e-5),  # R, PropCIs::scoreci.mp(25, 28, 618, 0.90)
    ],
)
def test_tango_published_values(flipped, gained, n, confidence, expected, places):
    assert tango_interval(flipped, gained, n, confidence) == pytest.approx(expected, abs=places)


def score_statistic(b, c, n, delta):
    """|Z| with the constrained MLE found by brute force over P(old right, new wrong)."""
    grid = np.linspace(max(0.0, -delta), (1 - delta) / 2, 40_001)[1:-1]
    other = grid + delta
    rest = 1 - grid - other
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [k * np.log(p) if k else 0 * p for k, p in ((b, grid), (c, other), (n - b - c, rest))]
    q = grid[np.nanargmax(sum(terms))]
    return abs(c - b - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize(("b", "c", "n"), [(3, 9, 40), (0, 4, 25), (5, 0, 30), (10, 10, 60), (1, 1, 8)])
def test_tango_ends_solve_the_score_equation_by_brute_force(b, c, n):
    for end in tango_interval(b, c, n, 0.95):
        assert score_statistic(b, c, n, end) == pytest.approx(1.959964, abs=2e-3)


@pytest.mark.parametrize("n", [1, 10, 400])
def test_tango_without_discordant_pairs_is_not_a_point(n):
    edge = 1.959964**2 / (n + 1.959964**2)
    assert tango_interval(0, 0, n, 0.95) == pytest.approx((-edge, edge), abs=1e-6)


@pytest.mark.parametrize("rates", [(0.05, 0.10), (0.02, 0.02), (0.01, 0.0), (0.15, 0.1)])
def test_tango_coverage_by_simulation(rates):
    rng = np.random.default_rng(0)
    n, truth = 80, rates[1] - rates[0]
    draws = rng.multinomial(n, [*rates, 1 - sum(rates)], size=4000)
    interval = cache(lambda b, c: tango_interval(b, c, n, 0.95))
    hits = [
        low - 1e-12 <= truth <= high + 1e-12 for low, high in (interval(int(b), int(c)) for b, c, _ in draws)
    ]
    assert np.mean(hits) >= 0.935


def test_few_clusters_widen_tango_by_students_t():
    assert critical_value(0.95, 11) == pytest.approx(stats.t.ppf(0.975, 10))
    assert critical_value(0.95) == pytest.approx(stats.norm.ppf(0.975))
    assert critical_value(0.95, 1) == math.inf
    assert tango_interval(3, 2, 50, 0.95, blocks=1) == (-1.0, 1.0)
    t = stats.t.ppf(0.975, 10)
    assert tango_interval(0, 0, 50, 0.95, blocks=11)[1] == pytest.approx(t**2 / (50 + t**2))


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 40), (200, 1000)])
def test_clopper_pearson(hits, n):
    found = clopper_pearson(hits, n, 0.95)
    assert found == pytest.approx(stats.binomtest(hits, n).proportion_ci(0.95, "exact"))
    assert found == pytest.approx(proportion_confint(hits, n, 0.05, "beta"))


def bca(values, sizes, confidence, resamples=40_000):
    """Efron's BCa of sum(values) / sum(sizes), written out with its own draws."""
    rng, n = np.random.default_rng(9), len(values)
    took = rng.integers(0, n, (resamples, n))
    means = values[took].sum(axis=1) / sizes[took].sum(axis=1)
    estimate = values.sum() / sizes.sum()
    bias = stats.norm.ppf(np.mean(means < estimate))
    left_out = (values.sum() - values) / (sizes.sum() - sizes)
    apart = left_out.mean() - left_out
    speed = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    z = stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    return np.quantile(means, stats.norm.cdf(bias + (bias + z) / (1 - speed * (bias + z))))


def test_bootstrap_against_scipy_and_the_formula_written_out():
    values = np.random.default_rng(1).exponential(0.3, 60) - 0.25
    found = bootstrap_interval(list(values), 0.95, 0)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, random_state=5).confidence_interval
    width = found[1] - found[0]
    assert found == pytest.approx(tuple(theirs), abs=0.05 * width)
    assert found == pytest.approx(tuple(bca(values, np.ones(60), 0.95)), abs=0.05 * width)
    assert bootstrap_interval(list(values), 0.95, 0) == found
    assert bootstrap_interval([0.25] * 9, 0.95, 0) == (0.25, 0.25)


def test_bootstrap_of_clusters_draws_clusters():
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 9, 50)
    sums = sizes * rng.normal(0.1, 0.3, 50)
    found = bootstrap_interval(list(sums), 0.9, 0, list(sizes))
    assert found == pytest.approx(tuple(bca(sums, sizes, 0.9)), abs=0.05 * (found[1] - found[0]))
    assert bootstrap_interval([0.5, 1.0, 1.5], 0.9, 0, [1, 2, 3]) == (0.5, 0.5)


def test_a_large_sample_takes_percentiles():
    values = np.random.default_rng(3).normal(0, 1, 10_001)
    half = 1.645 * values.std() / 100
    found = bootstrap_interval(list(values), 0.9, 0)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-3)


def test_expanded_level_by_hand():
    tail = (1 - expanded(0.95, 10)) / 2
    assert tail == pytest.approx(stats.norm.cdf(-math.sqrt(10 / 9) * stats.t.ppf(0.975, 9)))
    assert expanded(0.95, 10**6) == pytest.approx(0.95, abs=1e-5)
    assert expanded(0.95, 1) < 1


def test_widened_by_hand():
    z = 1.959964
    unseen = z * z / (100 + z * z)
    assert widened((0.0, 0.0), 0.0, 100, z) == pytest.approx(tango_interval(0, 0, 100, 0.95), abs=1e-6)
    assert widened((0.5, 0.5), 0.5, 100, z) == pytest.approx(
        (0.5 * (1 - unseen) - unseen, 0.5 * (1 - unseen) + unseen)
    )
    assert widened((-0.2, 0.3), 0.0, 100, z) == (-0.2, 0.3)
