"""Task-matrix metrics by hand."""

from __future__ import annotations

import pytest

from meristem.errors import BadInput
from meristem.evaluation.metrics import TaskMatrix

HAND = TaskMatrix(((0.8, 0.2, 0.1), (0.5, 0.9, 0.3), (0.6, 0.7, 1.0)), baseline=(0.1, 0.1, 0.2))


def test_hand_worked_matrix():
    assert HAND.acc == pytest.approx((0.6 + 0.7 + 1.0) / 3)
    assert HAND.bwt == pytest.approx(((0.6 - 0.8) + (0.7 - 0.9)) / 2)
    assert HAND.fwt == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert HAND.forgetting == pytest.approx((0.2 + 0.2 + 0.0) / 3)


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
