"""Probabilities of verdicts against brute force and SciPy, and the number of items asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from tests.evaluation.paired import counts, results

from meristem.evaluation import power
from meristem.evaluation.comparison import compare
from meristem.evaluation.intervals import clopper_pearson, tango_interval
from meristem.evaluation.power import Question, binary_chances, chances, items_needed, score_statistic
from meristem.evaluation.sample import Sample
from meristem.evaluation.verdicts import non_inferiority


@pytest.mark.parametrize("question", [Question(-0.05, 0.0), Question(0.1, 0.1), Question(-0.2, 0.0, 0.9)])
def test_chances_by_going_through_every_outcome(question):
    """All counts of 25 pairs, each judged by its interval, weighed by SciPy's multinomial."""
    b, c, n, passed, failed = 0.12, 0.2, 25, 0.0, 0.0
    for x, y in itertools.product(range(n + 1), repeat=2):
        if x + y <= n:
            low, high = tango_interval(x, y, n, 2 * question.confidence - 1)
            mass = stats.multinomial.pmf([x, y, n - x - y], n, [b, c, 1 - b - c])
            passed += mass * (low > question.low)
            failed += mass * (low <= question.low and high < question.high)
    found = binary_chances(b, c, n, question)
    assert found == pytest.approx((passed, failed), abs=2e-6)


def test_the_statistic_is_where_the_interval_ends():
    for b, c, n in ((3, 9, 40), (0, 0, 30), (5, 0, 25)):
        low, high = tango_interval(b, c, n, 0.9)
        for end in (low, high):
            z = score_statistic(np.array([b]), np.array([c]), n, end)[0]
            assert abs(z) == pytest.approx(stats.norm.ppf(0.95), abs=1e-6)


def test_sums_and_normal_theory_agree_where_they_meet(monkeypatch):
    truth = (0.06, 0.04, 1000, Question(-0.01, 0.0))
    exact = binary_chances(*truth)
    monkeypatch.setattr(power, "MOST_DISCORDANT", 0)
    assert binary_chances(*truth) == pytest.approx(exact, abs=0.02)


def test_items_needed_cases():
    def needed(flipped, gained, n, low, high=0.0):
        return items_needed(counts(flipped, gained, n).sample, Question(low, high))

    assert needed(5, 5, 100, 0.0) is None  # equally good: margin 0 is never settled
    assert needed(4, 6, 100, 0.02, 0.02) is None  # exactly the gain asked for
    assert needed(5, 5, 100, -0.02) < needed(5, 5, 100, -0.01)
    assert needed(0, 0, 20, -0.02) == 133
    # either verdict settles: half way between margin and 0 takes fewer items than one side alone would
    one_side = 0.09 * (stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) ** 2 / 0.01**2
    assert needed(10, 8, 200, -0.02) < 0.9 * one_side


def test_a_larger_gap_meets_the_textbook_formula():
    """n = (z_a sqrt(V0) + z_b sqrt(V1))^2 / d^2 of McNemar's test (Connett, Smith & McHugh 1987)."""
    b, c = 0.12, 0.06
    v0, v1 = b + c, b + c - (b - c) ** 2
    textbook = ((stats.norm.ppf(0.95) * v0**0.5 + stats.norm.ppf(0.8) * v1**0.5) / (b - c)) ** 2
    found = items_needed(counts(6, 3, 50).sample, Question(0.0, 0.0))
    assert found == pytest.approx(textbook, rel=0.05)


def test_clusters_need_as_many_items_as_they_hide():
    old, new = [1] * 6 + [0] * 6 + [1] * 88, [0] * 6 + [1] * 6 + [1] * 88
    alone = non_inferiority(compare(old=results(old), new=results(new)), 0.02).needed
    sources = [f"doc {i // 2}" for i in range(200)]
    twice = compare(
        old=results(np.repeat(old, 2), clusters=sources), new=results(np.repeat(new, 2), clusters=sources)
    )
    assert non_inferiority(twice, 0.02).needed == pytest.approx(2 * alone, rel=0.05)


def test_graded_items_asked_for_settle_it():
    rng = np.random.default_rng(0)
    old = rng.beta(4, 2, 60)
    new = np.clip(old + rng.normal(0, 0.1, 60), 0, 1)
    new -= (new - old).mean()
    new = np.clip(new, 0, 1)
    found = compare(old=results(old), new=results(new))
    verdict = non_inferiority(found, 0.02)
    assert verdict.outcome == "inconclusive"
    assert chances(found.sample, Question(-0.02, 0.0), verdict.needed).settled >= 0.8
    settled = 0
    for _ in range(80):
        took = rng.integers(0, 60, verdict.needed)
        pairs = list(zip(old[took], new[took], strict=True))
        low, high = Sample.of(pairs, None, binary=False).interval(0.9, 0)
        settled += low > -0.02 or high < 0
    assert 0.66 <= settled / 80 <= 0.94  # 0.80 -+ three standard errors


@pytest.mark.parametrize("max_rate", [0.0, 0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 20, 133])
def test_flip_limits_are_those_of_the_interval(max_rate, n):
    bounds = [clopper_pearson(k, n, 0.9) for k in range(n + 1)]
    most = max((k for k, (_, high) in enumerate(bounds) if high <= max_rate), default=-1)
    least = min((k for k, (low, _) in enumerate(bounds) if low > max_rate), default=n + 1)
    if max_rate < 1:  # at 1 every count passes, and no verdict asks for items
        assert power._most_passing(n, max_rate, 0.95) == most
    assert power._least_failing(n, max_rate, 0.95) == least
