"""Comparisons by hand: pairing, groups, units, documents. The numbers' own tests stand in test_intervals.py,
test_significance.py and test_clusters.py."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluation.paired import counts, results

from meristem.errors import BadInput
from meristem.evaluation.comparison import compare
from meristem.evaluation.intervals import expanded
from meristem.store.canonical import canonical


def test_a_comparison_by_hand():
    old = results([1, 1, 0, 0, 1], ["x", "x", "y", None, "y"])
    new = results([0, 1, 1, 0, 1], ["x", "x", "y", None, "y"])
    found = compare(old=old, new=new[::-1])
    assert (found.n, found.old_score, found.new_score, found.difference) == (5, 0.6, 0.6, 0.0)
    assert (found.flipped, found.gained, found.nfr, found.pfr) == (("t/0",), ("t/2",), 0.2, 0.2)
    assert found.variance == pytest.approx(0.4)
    assert [(g.name, g.n, g.difference, g.flipped, g.gained, g.nfr, g.pfr) for g in found.slices] == [
        ("x", 2, -0.5, 1, 0, 0.5, 0.0),
        ("y", 2, 0.5, 0, 1, 0.0, 0.5),
    ]
    assert all(g.too_few and g.p_adjusted is None and not g.regressed for g in found.slices)
    assert [(g.name, g.too_few, g.p_worse) for g in found.tasks] == [("t", False, 0.75)]
    assert (found.test, found.p_value, found.mcnemar_p) == ("mcnemar", 1.0, 1.0)
    assert (found.unit, found.clusters, found.design_effect, found.unproven) == (None, None, 1.0, "")
    document = found.to_document()
    canonical(document)
    assert json.loads(json.dumps(document)) == document
    assert "sample" not in document and "bootstrap" in document


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
        (results([1]), results([-3.2]), "new score of item t/0 is -3.2, not a share"),
        (results([-1], unit="nats"), results([1]), "old scores are in nats, the new in shares"),
        (
            results([-1], unit="nats"),
            results([-1], unit="bits_per_byte"),
            "in nats, the new in bits_per_byte",
        ),
        (results([-1], unit="nats"), results([1]) + results([-1], task="u", unit="nats"), "stand in one"),
        (
            [*results([1]), *results([-1], task="u", unit="nats")],
            [*results([1]), *results([-1], task="u", unit="nats")],
            "old results mix scores of different units",
        ),
        (results([1], unit="bananas"), results([1], unit="bananas"), "unknown unit 'bananas'"),
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
    assert found.interval == found.sample.bootstrap(expanded(0.95, 50), 0)
    assert found.tasks[0].interval == found.interval
    low, high = found.bounds(0.95)
    assert found.interval[0] < low < found.difference < high < found.interval[1]
    assert found.interval[0] < found.bootstrap[0]  # the plain one is too narrow for 50 items
    assert found.test == "permutation" and found.p_value > 0.05


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


def sliced(flips, n=40):
    """One slice per entry, of ``n`` items of which the first so many flipped."""
    old, new, names = [], [], []
    for name, flipped in flips.items():
        old += [1] * n
        new += [0] * flipped + [1] * (n - flipped)
        names += [name] * n
    return compare(old=results(old, names), new=results(new, names))


def test_holm_over_slices_by_hand():
    """One-sided exact McNemar of k flips is 2^-k: 1/128, 1/64, 1/32 and 1 over four slices."""
    found = {g.name: g for g in sliced({"a": 6, "b": 7, "c": 5, "d": 0}).slices}
    assert [found[k].p_worse for k in "abcd"] == [1 / 64, 1 / 128, 1 / 32, 1.0]
    assert [found[k].p_adjusted for k in "abcd"] == pytest.approx([3 / 64, 4 / 128, 2 / 32, 1.0])
    comparison = sliced({"a": 6, "b": 7, "c": 5, "d": 0})
    assert comparison.regressed == ("a", "b")
    assert not found["c"].regressed  # 1/32 < 0.05 alone, not among four


def test_slices_of_a_handful_are_too_few_to_be_asked():
    """Four lost items of four: 2^-4 > 0.05, so the slice cannot be significant and costs the others nothing."""
    old = results([1] * 44, ["tiny"] * 4 + ["big"] * 40)
    new = results([0] * 4 + [0] * 5 + [1] * 35, ["tiny"] * 4 + ["big"] * 40)
    big, tiny = compare(old=old, new=new).slices
    assert tiny.too_few and tiny.p_adjusted is None and not tiny.regressed
    assert tiny.nfr == 1.0
    assert big.p_adjusted == big.p_worse == 1 / 32 and big.regressed


def test_scores_with_a_unit_have_no_flips():
    rng = np.random.default_rng(0)
    old = -rng.uniform(0.8, 1.2, 60)
    found = compare(
        old=results(old, ["x", "y"] * 30, unit="bits_per_byte"),
        new=results(old - 0.1 + rng.normal(0, 0.01, 60), ["x", "y"] * 30, unit="bits_per_byte"),
    )
    assert (found.unit, found.binary, found.flipped, found.gained) == ("bits_per_byte", False, (), ())
    assert (found.nfr, found.pfr, found.nfr_interval, found.mcnemar_p) == (None, None, None, None)
    assert found.difference == pytest.approx(-0.1, abs=0.01)
    assert found.interval[1] < -0.09 and found.unproven == ""
    assert [(g.flipped, g.gained, g.nfr, g.pfr, g.regressed) for g in found.slices] == [
        (None,) * 4 + (True,)
    ] * 2
    with pytest.raises(BadInput, match="bits_per_byte are neither right nor wrong"):
        found.nfr_bounds(0.95)
    canonical(found.to_document())


def test_scores_of_0_and_1_in_nats_are_not_right_and_wrong():
    found = compare(old=results([0, 1] * 20, unit="nats"), new=results([1, 1] * 20, unit="nats"))
    assert not found.binary and found.gained == ()
