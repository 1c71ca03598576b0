"""Paired statistics against published values, brute force and simulation; verdicts at their boundaries."""

from __future__ import annotations

import itertools
import json
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import BadInput
from meristem.evaluation.comparison import compare, items_for_gap, required_items
from meristem.evaluation.intervals import bootstrap_interval, clopper_pearson, mcnemar_p, tango_interval
from meristem.evaluation.verdicts import improvement, negative_flips, non_inferiority
from meristem.store.canonical import canonical


def results(scores, slices=None, task="t"):
    slices = slices or [None] * len(scores)
    return [
        {
            "task": task,
            "id": str(i),
            "slice": s,
            "score": float(v),
            "prediction": "p",
            "answer": "a",
            "detail": {},
        }
        for i, (v, s) in enumerate(zip(scores, slices, strict=True))
    ]


def counts(flipped, gained, n):
    """A comparison with these discordant pairs; the rest right in both."""
    old = [1] * flipped + [0] * gained + [1] * (n - flipped - gained)
    new = [0] * flipped + [1] * gained + [1] * (n - flipped - gained)
    return compare(old=results(old), new=results(new))


@pytest.mark.parametrize(
    ("flipped", "gained", "n", "confidence", "low", "high"),
    [
        (7, 1, 21, 0.95, None, None),  # Bentur 2009 in Fagerland, Lydersen & Laake 2014, signs turned
        (25, 28, 618, 0.90, -0.0148, 0.0247),  # R, PropCIs::scoreci.mp(25, 28, 618, 0.90)
    ],
)
def test_tango_published_values(flipped, gained, n, confidence, low, high):
    found = tango_interval(flipped, gained, n, confidence)
    if low is None:
        assert found == pytest.approx((-0.517, -0.026), abs=5e-4)
    else:
        assert found == pytest.approx((low, high), abs=5e-5)


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


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (3, 9), (6, 6), (10, 2)])
def test_mcnemar_by_enumeration(b, c):
    """Share of all 2^n ways to turn the discordant pairs that are at most as likely as this one."""
    n = b + c
    as_extreme = sum(math.comb(n, sum(w)) <= math.comb(n, b) for w in itertools.product((0, 1), repeat=n))
    assert mcnemar_p(b, c) == pytest.approx(as_extreme / 2**n)


def test_clopper_pearson_and_bootstrap():
    assert clopper_pearson(0, 10, 0.95) == pytest.approx((0, 1 - 0.025 ** (1 / 10)))
    assert bootstrap_interval([0.25] * 9, 0.95, 0) == (0.25, 0.25)
    values = np.random.default_rng(1).normal(0.3, 1, 200)
    low, high = bootstrap_interval(list(values), 0.95, 0)
    half = 1.96 * values.std() / math.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap_interval(list(values), 0.95, 0) == (low, high)


def test_a_comparison_by_hand():
    old = results([1, 1, 0, 0, 1], ["x", "x", "y", None, "y"])
    new = results([0, 1, 1, 0, 1], ["x", "x", "y", None, "y"])
    found = compare(old=old, new=new[::-1])
    assert (found.n, found.old_score, found.new_score, found.difference) == (5, 0.6, 0.6, 0.0)
    assert (found.flipped, found.gained, found.nfr) == (("t/0",), ("t/2",), 0.2)
    assert found.variance == pytest.approx(0.4)
    assert [(g.name, g.n, g.difference, g.flipped, g.gained) for g in found.slices] == [
        ("x", 2, -0.5, 1, 0),
        ("y", 2, 0.5, 0, 1),
    ]
    assert [g.name for g in found.tasks] == ["t"]
    document = found.to_document()
    canonical(document)
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (results([]), results([1]), "old results are empty"),
        (results([1]), results([]), "new results are empty"),
        (results([1, 0]), results([1]), "1 stand in one result only"),
        (results([1]), results([1], task="u"), "2 stand in one result only"),
        (results([1]) * 2, results([1]), "an item twice"),
        (results([1]), results([math.nan]), "not a finite number"),
        (results([1]), [{**results([1])[0], "answer": "b"}], "two different answers"),
    ],
)
def test_results_that_cannot_be_paired(old, new, message):
    with pytest.raises(BadInput, match=message):
        compare(old=old, new=new)


def test_old_and_new_are_said_by_name():
    """``Workspace.compare`` takes new, old: without names a swapped call would only change the sign."""
    with pytest.raises(TypeError):
        compare(results([1]), results([0]))


def test_confidence_is_checked():
    for wrong in (0.5, 1.0, 95):
        with pytest.raises(BadInput, match="confidence"):
            compare(old=results([1]), new=results([1]), confidence=wrong)
        with pytest.raises(BadInput, match="confidence"):
            counts(1, 1, 4).bounds(wrong)


def test_graded_scores_use_the_bootstrap():
    rng = np.random.default_rng(0)
    found = compare(old=results(rng.random(50)), new=results(rng.random(50)))
    assert not found.binary
    assert found.interval == found.bootstrap
    assert found.tasks[0].interval is None
    low, high = found.bounds(0.95)
    assert found.interval[0] < low < found.difference < high < found.interval[1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_swapping_old_and_new_negates_the_difference(pairs):
    old, new = results([a for a, _ in pairs]), results([b for _, b in pairs])
    one, other = compare(old=old, new=new), compare(old=new, new=old)
    assert other.difference == pytest.approx(-one.difference)
    assert (other.flipped, other.gained) == (one.gained, one.flipped)
    assert other.mcnemar_p == pytest.approx(one.mcnemar_p)
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]), abs=1e-9)
    assert one.interval[0] <= one.difference <= one.interval[1]
    assert one.bounds(0.95)[0] >= one.interval[0] - 1e-12


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 200),
    st.floats(0, 0.3),
)
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


def test_ten_agreeing_items_prove_little():
    few = counts(0, 0, 10)
    assert few.bootstrap == (0.0, 0.0)
    verdict = non_inferiority(few, 0.02)
    assert verdict.outcome == "inconclusive"
    assert non_inferiority(counts(0, 0, verdict.needed), 0.02).passed


@pytest.mark.parametrize("gate", [non_inferiority, improvement, negative_flips])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_shares_are_checked(gate, value):
    with pytest.raises(BadInput, match="between 0 and 1"):
        gate(counts(1, 1, 4), value)


def test_required_items_has_the_promised_power():
    b, c, margin = 0.06, 0.05, 0.03
    variance = b + c - (c - b) ** 2
    n = required_items(c - b, variance, margin)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [b, c, 1 - b - c], size=600)
    passed = np.mean([tango_interval(int(x), int(y), n, 0.9)[0] > -margin for x, y, _ in draws])
    assert 0.74 <= passed <= 0.86


def test_required_items_cases():
    assert required_items(0.0, 0.1, 0.0) is None
    assert required_items(-0.02, 0.1, 0.02) == items_for_gap(0.02, 0.1, 0.95)  # only failing can settle it
    assert required_items(-0.1, 0.1, 0.02) == items_for_gap(0.1, 0.1, 0.95)
    assert required_items(0.0, 0.1, 0.02) < required_items(0.0, 0.1, 0.01)
    assert required_items(0.0, 0.0, 0.02) > 100


def test_flip_items_needed_settle_it():
    found = counts(2, 0, 40)
    verdict = negative_flips(found, 0.08)
    assert verdict.outcome == "inconclusive"
    n = verdict.needed
    assert negative_flips(counts(round(0.05 * n), 0, n), 0.08).passed
    assert negative_flips(counts(2, 0, 40), 0.05).needed is None
