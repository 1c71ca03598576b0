"""Expected calibration error by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meristem.errors import BadInput
from meristem.evaluation.calibration import calibration, probabilities


def row(chosen, right, i=0, options=4):
    """An item answered with probability ``chosen``."""
    rest = (1 - chosen) / (options - 1)
    logprobs = {"a": math.log(chosen) - 7} | {f"o{k}": math.log(rest) - 7 for k in range(options - 1)}
    found = {
        "task": "t",
        "id": str(i),
        "slice": None,
        "score": float(right),
        "prediction": "a",
        "answer": "a",
    }
    return {**found, "detail": {"logprobs": logprobs}}


def test_softmax():
    found = probabilities({"a": -1000.0, "b": -1000.0 + math.log(3)})
    assert found == pytest.approx({"a": 0.25, "b": 0.75})


def test_ece_by_hand():
    """Two bins of 15: (9/15, 10/15] with 0.62 and 0.66, one right; (13/15, 14/15] with 0.9, right; 14/15.. empty."""
    found = calibration([row(0.62, 1), row(0.66, 0, 1), row(0.9, 1, 2)])
    assert found.n == 3 and len(found.bins) == 15
    assert found.ece == pytest.approx(2 / 3 * abs(0.5 - 0.64) + 1 / 3 * abs(1 - 0.9))
    assert [(b.n, b.low, b.high) for b in found.bins if b.n] == [(2, 9 / 15, 10 / 15), (1, 13 / 15, 14 / 15)]
    assert (found.bins[9].confidence, found.bins[9].accuracy) == (pytest.approx(0.64), 0.5)
    assert (found.bins[0].n, found.bins[0].accuracy) == (0, None)
    assert (found.accuracy, found.confidence) == (pytest.approx(2 / 3), pytest.approx(2.18 / 3))
    assert found.to_document()["bins"][9]["n"] == 2


def test_ece_of_many_items_against_numpy():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.01, 0.999, 2000)
    right = rng.random(2000) < p**1.5
    which = np.clip(np.ceil(p * 15) - 1, 0, 14).astype(int)
    expected = sum(abs((right[which == k] - p[which == k]).sum()) for k in range(15)) / 2000
    found = calibration([row(a, b, i) for i, (a, b) in enumerate(zip(p, right, strict=True))])
    assert found.ece == pytest.approx(expected)
    assert found.ece > 0.05


def test_certain_answers_fall_in_the_last_bin():
    certain = row(0.5, 1)
    certain["detail"] = {"logprobs": {"a": 0.0, "b": -2000.0}}
    found = calibration([certain])
    assert (found.bins[14].n, found.ece) == (1, 0.0)


def test_without_options_there_is_no_calibration():
    free = {**row(0.5, 1), "detail": {}}
    assert calibration([free]) is None
    assert calibration([]) is None
    assert calibration([free, row(0.5, 1)]).n == 1


def test_scores_that_are_no_shares_have_no_accuracy():
    margins = [{**row(0.9, 3.5, i), "unit": "nats"} for i in range(3)]
    assert calibration(margins) is None


def test_a_prediction_without_its_likelihood_is_refused():
    with pytest.raises(BadInput, match="item t/0: no finite log-likelihood"):
        calibration([{**row(0.5, 1), "prediction": "z"}])
