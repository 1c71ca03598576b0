"""Tests of paired results against SciPy, statsmodels and enumeration."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from meristem.evaluation.significance import fewest, holm, mcnemar_p, sign_flip_p


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (3, 9), (6, 6), (10, 2)])
def test_mcnemar_by_enumeration(b, c):
    """Share of all 2^n ways to turn the discordant pairs that are at most as likely as this one."""
    n = b + c
    as_extreme = sum(math.comb(n, sum(w)) <= math.comb(n, b) for w in itertools.product((0, 1), repeat=n))
    assert mcnemar_p(b, c) == pytest.approx(as_extreme / 2**n)
    worse = sum(sum(way) <= c for way in itertools.product((0, 1), repeat=n))
    assert mcnemar_p(b, c, "less") == pytest.approx(worse / 2**n)


@pytest.mark.parametrize(("b", "c"), [(0, 5), (3, 9), (6, 6), (40, 22), (121, 59)])
def test_mcnemar_against_statsmodels(b, c):
    assert mcnemar_p(b, c) == pytest.approx(mcnemar([[50, b], [c, 80]], exact=True).pvalue)


@pytest.mark.parametrize("alternative", ["two-sided", "less"])
def test_exact_sign_flips_against_scipy(alternative):
    values = np.round(np.random.default_rng(0).normal(-0.2, 0.5, 12), 1)
    theirs = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative=alternative
    )
    assert sign_flip_p([*values, 0.0, 0.0], 0, alternative) == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("alternative", ["two-sided", "less"])
def test_drawn_sign_flips_against_scipy(alternative):
    values = np.random.default_rng(1).normal(-0.1, 0.4, 80)
    theirs = stats.permutation_test(
        (values,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        alternative=alternative,
        random_state=0,
    ).pvalue
    found = sign_flip_p(values, 0, alternative)
    assert found == pytest.approx(theirs, abs=4 * math.sqrt(theirs * (1 - theirs) * (1 / 9999 + 1 / 20_000)))
    assert sign_flip_p(values, 0, alternative) == found


def test_sign_flips_of_right_and_wrong_are_mcnemars():
    for b, c in ((2, 9), (1, 5), (4, 4)):
        assert sign_flip_p([-1.0] * b + [1.0] * c, 0) == pytest.approx(mcnemar_p(b, c))
        assert sign_flip_p([-1.0] * b + [1.0] * c, 0, "less") == pytest.approx(mcnemar_p(b, c, "less"))
    assert sign_flip_p([0.0] * 5, 0) == 1.0
    assert sign_flip_p([-1.0] * 200, 0) == pytest.approx(1e-4)  # drawn: never 0


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.2], [], [0.5, 0.9, 0.5], [0.02, 0.02, 0.02]])
def test_holm_against_statsmodels(p):
    expected = multipletests(p, method="holm")[1] if p else []
    assert holm(p) == pytest.approx(list(expected))


def test_fewest_items_that_could_be_significant():
    for alpha in (0.05, 0.01, 0.25, 0.1):
        assert 0.5 ** fewest(alpha) < alpha <= 0.5 ** (fewest(alpha) - 1)
    assert fewest(1 - 0.95) == 5


def test_ten_slices_that_did_not_change_are_rarely_flagged():
    """Family-wise error of Holm over one-sided exact McNemar: at most 5 % (and three standard errors)."""
    p = cache(lambda b, c: mcnemar_p(b, c, "less"))
    draws = np.random.default_rng(0).multinomial(50, [0.1, 0.1, 0.8], size=(2000, 10))
    flagged = [min(holm([p(int(b), int(c)) for b, c, _ in slices])) < 0.05 for slices in draws]
    alone = [min(p(int(b), int(c)) for b, c, _ in slices) < 0.05 for slices in draws]
    assert np.mean(flagged) <= 0.065
    assert np.mean(alone) > 0.15  # what asking ten slices without a correction would do
