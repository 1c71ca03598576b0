"""Items that share a source: design effects, intervals and tests."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from tests.evaluation.paired import results

from meristem.errors import BadInput
from meristem.evaluation.clusters import design_effect, ratio_design_effect
from meristem.evaluation.comparison import compare
from meristem.evaluation.intervals import tango_interval
from meristem.evaluation.sample import Sample
from meristem.evaluation.verdicts import non_inferiority

# Weil's rats: survivors / litter size (table 1 of Rao & Scott 1992)
CONTROL = "13/13 12/12 9/9 9/9 8/8 8/8 12/13 11/12 9/10 9/10 8/9 11/13 4/5 5/7 7/10 7/10"
TREATED = "12/12 11/11 10/10 9/9 10/11 9/10 9/10 8/9 8/9 4/5 7/9 4/7 5/10 3/6 3/10 0/7"
KINDS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


@pytest.mark.parametrize(("litters", "expected"), [(CONTROL, 1.232495), (TREATED, 3.952861)])
def test_design_effect_published_values(litters, expected):
    """Rao & Scott's example; the numbers are those that the R package PF prints for it."""
    alive, sizes = zip(*(map(int, litter.split("/")) for litter in litters.split()), strict=True)
    p = sum(alive) / sum(sizes)
    assert ratio_design_effect(alive, sizes, p * (1 - p)) == pytest.approx(expected, abs=5e-7)


def test_design_effect_against_statsmodels_clustered_variance():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 8, 40)
    groups = np.repeat(np.arange(40), sizes)
    values = rng.choice([-1, 0, 1], 40)[groups] * (rng.random(len(groups)) < 0.6)
    fit = sm.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    sums = np.bincount(groups, values)
    theirs = fit.cov_params()[0, 0] * len(values) / values.var() * 40 / 39
    assert ratio_design_effect(list(sums), list(sizes), values.var()) == pytest.approx(theirs)


def test_the_design_effect_is_cautious_where_little_changed():
    sizes = [4] * 50
    assert design_effect([0] * 50, sizes, 0.0, 0) == 4.0  # nothing changed: clusters count, not items
    one = design_effect([-1] + [0] * 49, sizes, 0.005 * 0.995, 1)
    assert one == pytest.approx((4 + 50 / 49 * (1 - 2 / 200 + 200 * 0.005**2 * 4) / 0.995) / 2, rel=0.02)
    assert design_effect([1, -1] * 25, [1] * 50, 1.0, 50) == 1.0
    assert design_effect([0, 0, 0, 0], [2] * 4, 0.5, 4) == pytest.approx(1.0)  # flips cancel: floored at 1


def clustered(rng, clusters, size, b, c, rho):
    """Items copy their cluster's draw with probability sqrt(rho), so two of them correlate by rho."""
    p = [b, c, 1 - b - c]
    common = rng.choice(3, p=p, size=(clusters, 1))
    kinds = np.where(
        rng.random((clusters, size)) < rho**0.5, common, rng.choice(3, p=p, size=(clusters, size))
    )
    return [KINDS[k] for k in kinds.ravel()], [j for j in range(clusters) for _ in range(size)]


@pytest.mark.parametrize(
    ("clusters", "size", "b", "c", "rho"),
    [(100, 5, 0.05, 0.05, 0.5), (60, 5, 0.1, 0.05, 1.0), (100, 5, 0.1, 0.05, 0.0)],
)
def test_coverage_under_clusters(clusters, size, b, c, rho):
    """90 % intervals cover; those that take items as independent do not, once they are not."""
    rng, times = np.random.default_rng(0), 400
    ours = naive = flips = 0
    for _ in range(times):
        sample = Sample.of(*clustered(rng, clusters, size, b, c, rho))
        low, high = sample.interval(0.9, 0)
        ours += low <= c - b <= high
        low, high = tango_interval(sample.flipped, sample.gained, sample.n, 0.9)
        naive += low <= c - b <= high
        low, high = sample.flip_interval(0.9)
        flips += low <= b <= high
    assert ours / times >= 0.87  # 0.90 less two standard errors
    assert flips / times >= 0.87
    if rho:
        assert naive / times <= 0.75
    else:
        assert ours / times <= 0.96


def test_clusters_of_one_change_nothing():
    rng = np.random.default_rng(0)
    old, new = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    alone = [f"doc {i}" for i in range(80)]
    found = compare(old=results(old, clusters=alone), new=results(new, clusters=alone))
    assert found == compare(old=results(old), new=results(new))
    assert (found.clusters, found.design_effect, found.test) == (None, 1.0, "mcnemar")


def test_duplicated_items_bring_no_evidence():
    """Each item five times over, as one cluster: the interval of the items, with t for z and near-equal width."""
    rng = np.random.default_rng(0)
    old, new = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    sources = [f"doc {i // 5}" for i in range(1000)]
    once = compare(old=results(old), new=results(new))
    copies = compare(
        old=results(old.repeat(5), clusters=sources), new=results(new.repeat(5), clusters=sources)
    )
    assert copies.clusters == 200
    assert copies.design_effect == pytest.approx(5 * 200 / 199, rel=1e-3)
    assert copies.interval == pytest.approx(once.interval, abs=2e-3)
    assert copies.nfr_interval == pytest.approx(once.nfr_interval, abs=2e-3)
    assert copies.test == "cluster permutation"
    assert copies.p_value == pytest.approx(once.p_value, abs=0.03)
    assert copies.mcnemar_p < copies.p_value
    assert "1000 items from 200 sources" in non_inferiority(copies, 0.01).reason


def test_graded_duplicates_bring_no_evidence():
    rng = np.random.default_rng(1)
    old, new = rng.random(60), rng.random(60)
    sources = [f"doc {i // 4}" for i in range(240)]
    once = compare(old=results(old), new=results(new))
    copies = compare(
        old=results(old.repeat(4), clusters=sources), new=results(new.repeat(4), clusters=sources)
    )
    assert copies.interval == pytest.approx(once.interval, abs=0.01)
    assert copies.p_value == pytest.approx(once.p_value, abs=0.03)


def test_one_source_tells_nothing():
    same = ["the only document"] * 500
    found = compare(old=results([0] * 500, clusters=same), new=results([1] * 500, clusters=same))
    assert found.interval == (-1.0, 1.0)
    assert found.nfr_interval == (0.0, 1.0)
    assert non_inferiority(found, 0.5).outcome == "inconclusive"
    graded = compare(old=results([0.25] * 500, clusters=same), new=results([0.5] * 500, clusters=same))
    assert graded.interval == (-1.0, 1.0)


def test_agreement_counts_sources_not_items():
    sources = [f"doc {i // 10}" for i in range(1000)]
    found = compare(old=results([1] * 1000, clusters=sources), new=results([1] * 1000, clusters=sources))
    t = stats.t.ppf(0.95, 99)
    assert found.bounds(0.95)[1] == pytest.approx(t**2 / (100 + t**2))
    assert not non_inferiority(found, 0.02).passed  # 1,000 independent items would
    assert non_inferiority(found, 0.03).passed


def test_sources_must_be_the_same():
    with pytest.raises(BadInput, match="t/1 has two different clusters"):
        compare(old=results([1, 1], clusters=["a", "a"]), new=results([1, 1], clusters=["a", "b"]))
