"""The task matrix of a line, its scores given by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from meristem.evaluation.matrix import line_matrix

SUITES = [SimpleNamespace(name=task, record=SimpleNamespace(facts={"tasks": [task]})) for task in "ab"]
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


def test_tasks_in_another_unit_have_no_mean_with_shares():
    def suite(task, **more):
        return SimpleNamespace(name=task, record=SimpleNamespace(facts={"tasks": [task], **more}))

    bits = {"unit": "bits_per_byte"}
    line = [
        SimpleNamespace(label=name, record=SimpleNamespace(tasks=tasks))
        for name, tasks in (("v1", []), ("v2", ["b"]), ("v3", ["a", "b"]))
    ]

    def tasks(*suites):
        score = lambda version, _, task: SCORES[version.label]["ab".index(task)]  # noqa: E731
        return line_matrix(score, line, list(suites)).tasks

    assert tasks(suite("a"), suite("b", **bits)) == ("a",)
    assert tasks(suite("a", **bits), suite("b", **bits)) == ("b", "a")
    assert tasks(suite("a", unit="nats"), suite("b", **bits)) == ("b",)


def test_general_instruction_and_safety_deltas():
    """R[t] - R[0] of the line's last and first version: one score per suite, its newest version, unmixed kinds."""

    def suite(name, kinds, tasks):
        return SimpleNamespace(name=name, record=SimpleNamespace(facts={"tasks": tasks, "kinds": kinds}))

    suites = [
        suite("target", ["target"], ["a"]),
        suite("world", ["general"], ["old"]),  # a newer version of the suite follows
        suite("world", ["general"], ["g1", "g2"]),
        suite("maths", ["general"], ["g3"]),
        suite("follow", ["instruction"], ["i"]),
        suite("mixed", ["general", "target"], ["m"]),
        suite("harm", ["safety"], ["unmeasured"]),
    ]
    scores = {
        "v1": {"a": 0.1, "g1": 0.6, "g2": 0.8, "g3": 0.5, "i": 0.9},
        "v2": {"a": 0.9, "g1": 0.5, "g2": 0.7, "g3": 0.7, "i": 0.6},
    }
    line = [
        SimpleNamespace(label=name, record=SimpleNamespace(tasks=tasks))
        for name, tasks in (("v1", []), ("v2", ["a"]))
    ]
    found = line_matrix(lambda version, _, task: scores[version.label].get(task), line, suites)
    assert found.gad == pytest.approx(((0.6 - 0.7) + (0.7 - 0.5)) / 2)
    assert found.ifd == pytest.approx(-0.3)
    assert found.sd is None
    assert [(d.suite, d.kind) for d in found.deltas] == [
        ("world", "general"),
        ("maths", "general"),
        ("follow", "instruction"),
        ("harm", "safety"),
    ]
    document = found.to_document()
    assert (document["gad"], document["sd"]) == (found.gad, None)
    bare = line_matrix(lambda version, _, task: scores[version.label].get(task), line, suites, deltas=False)
    assert (bare.gad, bare.deltas) == (None, ())
