"""Cost of an evaluation by hand."""

from __future__ import annotations

import pytest

from meristem.errors import BadInput
from meristem.evaluation.cost import cost


def rows(*tokens):
    base = {"task": "t", "slice": None, "score": 1.0, "prediction": "", "answer": ""}
    details = [{} if count is None else {"tokens": count} for count in tokens]
    return [{**base, "id": str(i), "detail": detail} for i, detail in enumerate(details)]


def test_by_hand():
    found = cost(rows(10, 20, 30, 40), 8.0)
    assert (found.items, found.items_per_second, found.seconds_per_item) == (4, 0.5, 2.0)
    assert (found.tokens, found.tokens_per_item, found.tokens_per_second) == (100, 25.0, 12.5)
    assert found.to_document()["tokens"] == 100


def test_tokens_count_only_when_every_row_has_them():
    found = cost(rows(10, None), 1.0)
    assert (found.tokens, found.tokens_per_item, found.tokens_per_second) == (None, None, None)


def test_no_time_has_no_rate():
    found = cost(rows(1), 0.0)
    assert (found.items_per_second, found.tokens_per_second, found.seconds_per_item) == (None, None, 0.0)


@pytest.mark.parametrize(("results", "seconds"), [([], 1.0), (rows(1), -1.0), (rows(1), float("nan"))])
def test_refusals(results, seconds):
    with pytest.raises(BadInput):
        cost(results, seconds)
