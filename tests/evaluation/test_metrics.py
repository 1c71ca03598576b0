"""Task-matrix metrics by hand."""

from __future__ import annotations

import pytest

from meristem.errors import BadInput
from meristem.evaluation.metrics import TaskMatrix, mean_delta

HAND = TaskMatrix(((0.8, 0.2, 0.1), (0.5, 0.9, 0.3), (0.6, 0.7, 1.0)), baseline=(0.1, 0.1, 0.2))


def test_hand_worked_matrix():
    assert HAND.acc == pytest.approx((0.6 + 0.7 + 1.0) / 3)
    assert HAND.bwt == pytest.approx(((0.6 - 0.8) + (0.7 - 0.9)) / 2)
    assert HAND.fwt == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert HAND.forgetting == pytest.approx((0.2 + 0.2 + 0.0) / 3)


def test_forward_transfer_in_every_reading_by_hand():
    found = TaskMatrix(HAND.scores, HAND.baseline, single=(0.7, 0.8, 0.95))
    assert found.fwt == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert found.fwt_trained == pytest.approx(((0.9 - 0.8) + (1.0 - 0.95)) / 2)
    assert found.fwt_printed == pytest.approx(
        (0.7 - 0.1) / 2
    )  # the one task between first and last, over T - 1
    assert HAND.fwt_trained is None
    assert TaskMatrix(HAND.scores).fwt_printed is None
    assert TaskMatrix(HAND.scores, single=(0.7, None, 0.95)).fwt_trained is None
    assert TaskMatrix(((0.5,),), (0.1,), (0.4,)).fwt_trained is None
    assert found.to_document()["fwt_trained"] == found.fwt_trained


def test_mean_delta_by_hand():
    """GAD of two general suites: (0.5 - 0.6 + 0.9 - 0.7) / 2."""
    assert mean_delta([0.6, 0.7], [0.5, 0.9]) == pytest.approx(0.05)
    assert mean_delta([], []) is None
    assert mean_delta([0.6, None], [0.5, 0.9]) is None


def test_undefined_is_none():
    one = TaskMatrix(((0.5,),), baseline=(0.1,))
    assert (one.acc, one.bwt, one.fwt, one.forgetting) == (0.5, None, None, 0.0)
    lower = TaskMatrix(((0.8, None), (0.6, 0.9)))
    assert lower.acc == pytest.approx(0.75)
    assert lower.bwt == pytest.approx(-0.2)
    assert lower.fwt is None
    assert lower.forgetting == pytest.approx(0.1)
    hole = TaskMatrix(((0.8, 0.1), (None, 0.9)), baseline=(0.0, 0.0))
    assert (hole.acc, hole.bwt, hole.forgetting) == (None, None, None)
    assert hole.fwt == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("scores", "baseline", "message"),
    [
        ((), None, "square"),
        (((1.0, 1.0),), None, "square"),
        (((1.0,),), (1.0, 2.0), "2 baseline"),
        (((float("nan"),),), None, "finite"),
    ],
)
def test_refusals(scores, baseline, message):
    with pytest.raises(BadInput, match=message):
        TaskMatrix(scores, baseline)


def test_single_scores_are_checked():
    with pytest.raises(BadInput, match="2 single"):
        TaskMatrix(((1.0,),), None, (1.0, 2.0))
    with pytest.raises(BadInput, match="finite"):
        TaskMatrix(((1.0,),), None, (float("inf"),))
