"""How often a run that loses nothing is stopped, and how often one that forgets is."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy import stats
from tests.evaluation.paired import counts, results

from meristem.errors import BadInput
from meristem.evaluation.comparison import compare
from meristem.evaluation.looks import Looks, loss_p
from meristem.evaluation.significance import mcnemar_p, sign_flip_p

LOOKS, ITEMS = 10, 100
worse = cache(lambda flipped, gained: mcnemar_p(flipped, gained, "less"))


def answers(runs: int, drift: float, kept: float = 0.8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(runs, looks, 2): items that flipped and items that were gained since the start.

    Each item is right while a stationary AR(1) process of its own is positive, plus ``drift`` per look. Without
    drift that is reversible: at any look as many items are expected to have gone one way as the other, whatever the
    looks before it, on which it depends strongly.
    """
    rng = np.random.default_rng(seed)
    state = rng.standard_normal((runs, ITEMS))
    start, found = state > 0, []
    for look in range(1, LOOKS + 1):
        state = kept * state + np.sqrt(1 - kept**2) * rng.standard_normal(state.shape)
        now = state + drift * look > 0
        found.append(np.stack([(start & ~now).sum(1), (~start & now).sum(1)], 1))
    return np.stack(found, 1)


def stopped(looks: Looks, runs: np.ndarray) -> float:
    """Share of the runs that one of the looks stops."""
    count = 0
    for run in runs.tolist():
        streak = 0
        for flipped, gained in run:
            streak = looks.streak(streak, worse(flipped, gained))
            if looks.enough(streak):
                count += 1
                break
    return count / len(runs)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_harmless_runs_are_stopped_no_more_often_than_alpha(patience):
    runs, alpha = answers(2000, drift=0.0), 0.1
    looks = Looks.over(LOOKS * 7, 7, patience, alpha)
    assert looks.count == LOOKS
    # the share is one of a sample: two standard errors
    assert stopped(looks, runs) <= alpha + 2 * np.sqrt(alpha * (1 - alpha) / len(runs))
    if patience == 1:
        uncorrected = Looks(7, 7, 1, alpha)
        assert stopped(uncorrected, runs) > 2 * alpha


def test_a_run_that_forgets_is_stopped():
    looks = Looks.over(LOOKS * 7, 7, 2, 0.05)
    assert stopped(looks, answers(200, drift=-0.08)) > 0.9


def test_every_run_of_significant_looks_holds_one_of_those_that_alpha_is_divided_by():
    for count in range(1, 25):
        for patience in range(1, count + 1):
            looks = Looks.over(count, 1, patience, 0.05)
            numbered = [number for number in range(1, count + 1) if number % patience == 0]
            assert looks.level == pytest.approx(0.05 / len(numbered))
            for first in range(1, count - patience + 2):
                assert any(first <= number < first + patience for number in numbered)


@pytest.mark.parametrize(("n", "margin", "gain"), [(100, 0.05, 0.0), (100, 0.05, 0.05), (300, 0.02, 0.0)])
def test_a_loss_of_just_the_margin_is_rarely_significant(n, margin, gain):
    """The exact chance, summed over all counts: the test behind a margin is an approximation for binary scores."""
    lost = stats.binom(n, margin + gain)
    most = int(lost.ppf(1 - 1e-6))
    chance = dict.fromkeys((0.05, 0.01, 0.005), 0.0)
    for flipped in range(int(n * (margin + gain)), most + 1):
        others = stats.binom(n - flipped, gain / (1 - margin - gain))
        for gained in range(int(others.ppf(1 - 1e-4)) + 1):
            if flipped - gained > n * margin:
                blocks = [-1 + margin] * flipped + [1 + margin] * gained + [margin] * (n - flipped - gained)
                p_value = sign_flip_p(blocks, 0, "less")
                for level in chance:
                    chance[level] += lost.pmf(flipped) * others.pmf(gained) * (p_value < level)
    assert chance[0.005] > 0 and all(found <= level for level, found in chance.items())


def test_the_p_value_is_that_of_the_comparison_and_grows_with_the_margin():
    comparison = counts(18, 2, 60)
    found = [loss_p(comparison, margin) for margin in (0.0, 0.05, 0.2, 0.3)]
    assert found[0] == mcnemar_p(18, 2, "less")
    assert found == sorted(found) and found[1] < 0.01 and found[3] > 0.5
    graded = compare(old=results([0.9] * 30), new=results([0.8, 0.7, 0.75] * 10))
    assert loss_p(graded, 0.05) < 0.01 < 0.9 < loss_p(graded, 0.25)


def test_steps_that_are_looked_at():
    looks = Looks.over(25, 0.1, 2, 0.05)
    assert (looks.every, looks.count) == (3, 9)
    assert [step for step in range(1, 26) if looks.due(step)] == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert Looks.over(4, 0.1, 2, 0.05).count == 4 and Looks.over(20, 50, 1, 0.05).count == 1
    assert looks.level == pytest.approx(0.05 / 4) and looks.adjusted(0.01) == pytest.approx(0.04)
    assert Looks.over(25, 5, None, 0.05).level == pytest.approx(0.01)
    assert not Looks.over(25, 5, None, 0.05).enough(100)


def test_looks_that_cannot_work_are_refused():
    with pytest.raises(BadInput, match="patience 3 with 2 looks in 20 steps could never stop the run"):
        Looks.over(20, 10, 3, 0.05)
    with pytest.raises(BadInput, match="1000 looks leave each of them a level of 5e-05"):
        Looks.over(1000, 1, 1, 0.05)
