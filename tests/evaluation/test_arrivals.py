"""Evaluations of another workspace whose numbers nobody can have measured."""

from __future__ import annotations

import pytest

from meristem.ecosystem.records import Evaluation
from meristem.errors import BadInput
from meristem.evaluation.arrivals import check_arrival
from meristem.evaluation.service import summary
from meristem.store.canonical import canonical

ROW = {"task": "t", "id": "i", "slice": None, "score": -1.0, "prediction": "", "answer": "", "detail": {}}


def arrive(row, told):
    named = f"sha256:{'0' * 64}"
    record = Evaluation(content=named, suite=named, engine=named, settings={}, results=named, summary=told)
    check_arrival(None, [], record, lambda _: canonical([row]))


@pytest.mark.parametrize("detail", [{"bits": 1.0, "bytes": 0}, {"bits": 1.0}, {"samples": 3}, 7])
def test_results_that_cannot_be_summed_up_are_refused(detail):
    arrive(ROW, summary([ROW]))
    with pytest.raises(BadInput, match="its results are not what it says of them"):
        arrive({**ROW, "detail": detail}, {})
