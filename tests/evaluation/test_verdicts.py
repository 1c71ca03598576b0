"""Verdicts at their boundaries, and how often each is given."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluation.paired import counts, quick_counts, results

from meristem.errors import BadInput
from meristem.evaluation.comparison import compare
from meristem.evaluation.power import Question, binary_chances
from meristem.evaluation.verdicts import improvement, negative_flips, non_inferiority
from meristem.store.canonical import canonical


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 200), st.floats(0, 0.3))
def test_non_inferiority_follows_its_definition(flipped, gained, same, margin):
    if flipped + gained + same == 0:
        return
    found = counts(flipped, gained, flipped + gained + same)
    low, high = found.bounds(0.95)
    expected = "pass" if low > -margin else "fail" if high < 0 else "inconclusive"
    verdict = non_inferiority(found, margin)
    assert verdict.outcome == expected
    assert verdict.needed is None or (expected == "inconclusive" and verdict.needed > found.n)


def test_verdict_boundaries_are_strict_and_reasons_carry_numbers():
    found = counts(4, 4, 200)
    low, _ = found.bounds(0.95)
    assert non_inferiority(found, -low).outcome == "inconclusive"
    assert non_inferiority(found, -low + 1e-9).passed
    worse = non_inferiority(counts(30, 2, 100), 0.02)
    assert worse.outcome == "fail"
    assert "100.00" not in worse.reason
    assert "-28.00 points" in worse.reason
    assert non_inferiority(counts(5, 5, 40), 0.0).needed is None  # equal on average: margin 0 never settles
    gained = counts(0, 20, 100)
    low, high = gained.bounds(0.95)
    assert improvement(gained, low - 1e-9).passed
    assert improvement(gained, low).outcome == "inconclusive"
    assert improvement(gained, high).outcome == "inconclusive"
    assert improvement(gained, high + 1e-9).outcome == "fail"
    low, high = found.nfr_bounds(0.95)
    assert negative_flips(found, high).passed
    assert negative_flips(found, high - 1e-9).outcome == "inconclusive"
    assert negative_flips(found, low).outcome == "inconclusive"
    assert negative_flips(found, low - 1e-9).outcome == "fail"
    assert "4 of 200 items went from right to wrong (2.00%" in negative_flips(found, 0.5).reason
    canonical(worse.to_document())


@pytest.mark.parametrize("gate", [non_inferiority, improvement, negative_flips])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_shares_are_checked(gate, value):
    with pytest.raises(BadInput, match="between 0 and 1"):
        gate(counts(1, 1, 4), value)


def test_ten_agreeing_items_prove_little():
    few = counts(0, 0, 10)
    assert few.bootstrap == (0.0, 0.0)
    verdict = non_inferiority(few, 0.02)
    assert verdict.outcome == "inconclusive"
    assert verdict.needed == 133  # the first n with z^2 / (n + z^2) < 0.02
    assert non_inferiority(counts(0, 0, 133), 0.02).passed
    assert not non_inferiority(counts(0, 0, 132), 0.02).passed


@pytest.mark.parametrize("scores", [[0.5] * 10, [0.0, 0.3, 0.9] * 3])
def test_graded_scores_that_did_not_change_prove_as_little(scores):
    """All differences equal: the bootstrap is a point, the verdict is not."""
    found = compare(old=results(scores), new=results(scores))
    assert found.bootstrap == (0.0, 0.0)
    assert found.bounds(0.95) == pytest.approx(counts(0, 0, len(scores)).bounds(0.95))
    verdict = non_inferiority(found, 0.02)
    assert (verdict.outcome, verdict.needed) == ("inconclusive", 133)
    many = (scores * 20)[:133]
    assert non_inferiority(compare(old=results(many), new=results(many)), 0.02).passed


def test_a_constant_gain_on_few_graded_items_is_no_improvement_yet():
    found = compare(old=results([0.4] * 5), new=results([0.5] * 5))
    assert improvement(found).outcome == "inconclusive"
    many = compare(old=results([0.4] * 60), new=results([0.5] * 60))
    assert improvement(many).passed


@pytest.mark.parametrize("n", [1, 5, 19])
def test_few_items_without_bounds_are_inconclusive(n):
    rng = np.random.default_rng(0)
    gain = results(1 + rng.normal(0, 0.01, n), unit="nats")
    found = compare(old=results([0.0] * n, unit="nats"), new=gain)
    assert "too few" in found.unproven
    for verdict in (improvement(found), non_inferiority(found, 5.0)):
        assert (verdict.outcome, verdict.needed) == ("inconclusive", 20)
        assert "too few" in verdict.reason
    assert found.tasks[0].interval is None


def test_equal_differences_without_bounds_never_pass():
    found = compare(old=results([-1.0] * 50, unit="nats"), new=results([0.0] * 50, unit="nats"))
    assert "all 50 differences are equal" in found.unproven
    for verdict in (improvement(found), non_inferiority(found, 1.0)):
        assert (verdict.outcome, verdict.needed) == ("inconclusive", None)


def test_verdicts_in_bits_per_byte():
    rng = np.random.default_rng(0)
    old = -rng.uniform(0.8, 1.2, 50)
    new = old - 0.05 + rng.normal(0, 0.02, 50)
    found = compare(old=results(old, unit="bits_per_byte"), new=results(new, unit="bits_per_byte"))
    worse = non_inferiority(found, 0.02)
    assert worse.outcome == "fail"
    assert "bits per byte" in worse.reason and "points" not in worse.reason and "%" not in worse.reason
    assert f"{-found.old_score:.4f} -> {-found.new_score:.4f}" in worse.reason  # as people count bits
    assert f"difference {-found.difference:+.4f}" in worse.reason
    assert non_inferiority(found, 1.5).passed  # a margin above 1 has a meaning here
    with pytest.raises(BadInput, match="a number of bits per byte, 0 or more"):
        non_inferiority(found, -0.1)
    with pytest.raises(BadInput, match="neither right nor wrong"):
        negative_flips(found, 0.1)


# How often each verdict is given. Counts decide binary verdicts, so equal counts are judged once.


@cache
def outcome(gate, number, flipped, gained, n):
    return gate(quick_counts(flipped, gained, n), number).outcome


@pytest.mark.parametrize("gate", [non_inferiority, improvement, negative_flips])
@pytest.mark.parametrize("case", [(0, 0, 9), (4, 1, 80), (30, 2, 100), (1, 9, 60)])
def test_simulated_comparisons_are_judged_like_real_ones(gate, case):
    real, quick = gate(counts(*case), 0.05), gate(quick_counts(*case), 0.05)
    assert (quick.outcome, quick.reason, quick.needed) == (real.outcome, real.reason, real.needed)
    assert quick.numbers == pytest.approx(real.numbers)


def outcomes(rng, n, b, c, times, gate=non_inferiority, number=0.02):
    draws = rng.multinomial(n, [b, c, 1 - b - c], size=times)
    return np.array([outcome(gate, number, int(x), int(y), n) for x, y, _ in draws])


def test_a_planted_regression_fails():
    """1,000 items, 5 % discordant, 3 points lost: *fail* in at least 95 of 100 comparisons (exact: 99.8)."""
    found = outcomes(np.random.default_rng(0), 1000, 0.04, 0.01, 2000)
    assert ((found == "fail").reshape(20, 100).sum(axis=1) >= 95).all()


@pytest.mark.parametrize(
    ("n", "discordance", "difference"),
    [
        (100, 0.1, 0.0),
        (100, 0.3, -0.1),
        (300, 0.05, -0.03),
        (300, 0.1, 0.02),
        (1000, 0.05, -0.02),
        (1000, 0.1, -0.01),
    ],
)
def test_pass_and_fail_rates_are_within_three_points_of_analytic_power(n, discordance, difference):
    b, c = (discordance - difference) / 2, (discordance + difference) / 2
    found = outcomes(np.random.default_rng(1), n, b, c, 1500)
    exact = binary_chances(b, c, n, Question(-0.02, 0.0))
    assert np.mean(found == "pass") == pytest.approx(exact.passed, abs=0.03)
    assert np.mean(found == "fail") == pytest.approx(exact.failed, abs=0.03)


@pytest.mark.parametrize(
    ("n", "discordance", "margin"), [(50, 0.2, 0.0), (200, 0.05, 0.0), (1000, 0.05, 0.02), (1000, 0.2, 0.02)]
)
def test_equally_good_models_rarely_fail(n, discordance, margin):
    half = discordance / 2
    found = outcomes(np.random.default_rng(2), n, half, half, 2000, number=margin)
    assert np.mean(found == "fail") <= 0.065


@pytest.mark.parametrize(
    ("gate", "number", "flipped", "gained", "n"),
    [
        (non_inferiority, 0.02, 2, 2, 100),
        (non_inferiority, 0.02, 3, 1, 100),
        (non_inferiority, 0.05, 2, 0, 40),
        (improvement, 0.05, 2, 4, 60),
        (negative_flips, 0.1, 3, 0, 40),
    ],
)
def test_too_few_items_ask_for_the_right_number(gate, number, flipped, gained, n):
    """At the number asked for, four in five comparisons are settled; at two thirds of it, fewer."""
    verdict = gate(counts(flipped, gained, n), number)
    assert verdict.outcome == "inconclusive"
    assert f"about {verdict.needed} items would settle it (there are {n})" in verdict.reason
    rng, settled = np.random.default_rng(3), []
    for items in (verdict.needed, verdict.needed * 2 // 3):
        found = outcomes(rng, items, flipped / n, gained / n, 1000, gate, number)
        settled.append(np.mean(found != "inconclusive"))
    assert 0.77 <= settled[0] <= 0.86
    assert settled[1] < settled[0] - 0.05
