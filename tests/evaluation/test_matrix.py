"""The task matrix of a line, its scores given by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from meristem.evaluation.matrix import line_matrix

SUITES = [SimpleNamespace(record=SimpleNamespace(facts={"tasks": [task]})) for task in "ab"]
SCORES = {"v1": (0.1, 0.1), "v2": (0.9, 0.2), "v3": (0.8, 0.7), "v4": (0.5, 0.95)}


def matrix(**learned):
    line = [
        SimpleNamespace(label=name, record=SimpleNamespace(tasks=tasks)) for name, tasks in learned.items()
    ]
    return line_matrix(lambda version, _, task: SCORES[version.label]["ab".index(task)], line, SUITES)


def test_a_row_for_each_task_learned():
    found = matrix(v1=[], v2=["a"], v3=["a", "b"])
    assert (found.versions, found.tasks) == (("v2", "v3"), ("a", "b"))
    assert found.matrix.scores == (SCORES["v2"], SCORES["v3"]) and found.matrix.baseline == SCORES["v1"]


def test_the_last_row_is_the_version_asked_about():
    """v4 was retrained on known data only: what it forgot since v3 must show."""
    found = matrix(v1=[], v2=["a"], v3=["a", "b"], v4=["a", "b"])
    assert (found.versions, found.tasks) == (("v2", "v4"), ("a", "b"))
    assert found.matrix.scores == (SCORES["v2"], SCORES["v4"])
    assert found.matrix.bwt == pytest.approx(0.5 - 0.9)
