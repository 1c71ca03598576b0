"""Evaluations in a workspace: never computed twice, compared only like with like, and the matrix of a line."""

from __future__ import annotations

import pytest
from tests import acme

import meristem as ms
from meristem.ecosystem import scratch
from meristem.errors import BadInput
from meristem.evaluation import service


@pytest.fixture
def ws(grown):
    ws = ms.Workspace.open(grown)
    yield ws
    ws.close()


def test_the_same_triple_is_never_computed_twice(ws, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("computed again")

    first = ws.evaluate("base@v1", "a")
    monkeypatch.setattr(service, "evaluate", refuse)
    again = ws.evaluate("base@v1", "a")
    assert again.cached and again.record == first.record
    assert ws.evaluate("support@v1", "a").digest == first.digest  # another version, the same content
    with pytest.raises(AssertionError):
        ws.evaluate("base@v1", "b")


def test_the_same_again_from_nothing(ws, fresh_results):
    assert ws.results(ws.evaluate("support@v2", "a")) == fresh_results


@pytest.fixture
def fresh_results(released, copy):
    """The items of v2 on suite a, measured in another copy whose evaluations are gone."""
    folder = copy(released, "other")
    import sqlite3

    with sqlite3.connect(folder / ".meristem/meristem.db") as connection:
        connection.execute("delete from evaluations")
    connection.close()
    other = ms.Workspace.open(folder)
    entry = other.evaluate("support@v2", "a")
    assert not entry.cached
    yield other.results(entry)
    other.close()


def test_different_suites_or_engines_are_not_compared(ws, grown):
    old, new = ws.evaluate("support@v2", "a"), ws.evaluate("support@v4", "b")
    with pytest.raises(BadInput, match=r"the suites differ \(sha256:[0-9a-f]+\.\.\. and sha256:"):
        ws.evaluator().compare(old, new)
    text = (grown / "meristem.yaml").read_text()
    (grown / "meristem.yaml").write_text(text.replace("batch_tokens: 8192", "batch_tokens: 4096"))
    other = ms.Workspace.open(grown)
    with pytest.raises(BadInput, match=r"the engines differ \(batch_tokens 8192 and 4096\)"):
        ws.evaluator().compare(old, other.evaluate("support@v4", "a"))
    other.close()


def test_different_chat_templates_are_not_compared(fresh, tmp_path):
    """The same weights behind another template answer another question."""
    ws = ms.Workspace.open(fresh)
    other = acme.model_folder(tmp_path / "other")
    path = other / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "support"))
    ws.add_model("other", tier="foundation", source=str(other))
    with pytest.raises(BadInput, match=r"the chat templates differ \(sha256:"):
        ws.compare("other", "base", suite="a")
    ws.close()


def test_a_suite_changed_under_its_name_is_another_suite(fresh, tmp_path):
    """What was added is what is measured, whatever becomes of the file; its next version is not comparable."""
    ws = ms.Workspace.open(fresh)
    old = ws.evaluate("base", "a")
    ws.add_suite("a", acme.suite_file(tmp_path / "a.yaml", "b"))
    assert ws.evaluate("base", "a@v1").cached
    with pytest.raises(BadInput, match="the suites differ"):
        ws.evaluator().compare(old, ws.evaluate("base", "a"))
    ws.close()


def test_a_journal_left_by_a_kill_goes_with_gc(ws, grown):
    evaluation = ws.evaluate("support@v2", "a").record
    key = (evaluation.content, evaluation.suite, evaluation.engine)
    stale, live = scratch.journal(ws.store, key), scratch.journal(ws.store, (*key[:2], "sha256:0"))
    for path in (stale, live):
        path.write_text("")
    ws.collect_garbage()
    assert live.exists() and not stale.exists()


def test_the_matrix_of_a_line(ws):
    """v4 stands on v2: two tasks in the order learned; v3, a sibling, is not in the line."""
    found = ws.task_matrix("support@v4")
    assert found.versions == ("support@v2", "support@v4") and found.tasks == ("a", "b")
    scores = [[ws.evaluate(v, s).record.summary["score"] for s in "ab"] for v in found.versions]
    assert [list(row) for row in found.matrix.scores] == scores
    assert found.matrix.bwt == pytest.approx(scores[1][0] - scores[0][0])
    assert ws.task_matrix("support@v3").matrix.bwt < -0.5  # it forgot a
    with pytest.raises(BadInput, match="learned no task that a suite tests"):
        ws.task_matrix("base@v1")


def test_a_mixed_suite_guards_the_old_task_too(fresh, files, tmp_path):
    """One suite for both tasks: while b is new, the gates on learned suites look at it as well."""
    from meristem.release import criteria

    ws = ms.Workspace.open(fresh)
    ws.add_suite("all", acme.suite_file(tmp_path / "all.yaml", "a", "b"))
    with ws.store.database.read() as connection:
        newest = criteria.newest_suites(connection)
    found = criteria.spelled_out(ws.settings("support"), newest, {"b"}, {"a"})
    assert [(c.gate, c.suite) for c in found] == [
        ("improvement", "all"),
        ("improvement", "b"),
        ("non_inferiority", "a"),
        ("non_inferiority", "all"),
        ("negative_flips", "a"),
        ("negative_flips", "all"),
    ]
    ws.close()
