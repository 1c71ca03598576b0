"""Policy, decisions, promotion and rollback: every way that a pointer may move, and may not."""

from __future__ import annotations

import dataclasses
import shutil
import sqlite3

import pytest
from sqlalchemy import event as sql_event
from tests import acme

import meristem as ms
from meristem.config import ModelSettings
from meristem.ecosystem import ledger
from meristem.ecosystem.records import Approval, Decision, Release
from meristem.errors import BadInput, GateFailed, StateMoved
from meristem.release import criteria, decisions, gates, rollout


@pytest.fixture
def ws(grown):
    ws = ms.Workspace.open(grown, actor="kim")
    yield ws
    ws.close()


def champion(ws):
    return ws.version("support").number


def names(ws, gate, new, old):
    with ws.store.database.read() as connection:
        newest = criteria.newest_suites(connection)
    found = criteria.spelled_out(ModelSettings.model_validate({"gates": [gate]}), newest, new, old)
    return [criterion.suite for criterion in found]


def test_groups_of_suites(ws, tmp_path):
    """``new``: tasks taught first; ``learned``: taught before, and general, instruction or safety; ``all``; names."""
    ws.add_suite("manners", acme.suite_file(tmp_path / "manners.yaml", "c", kind="safety"))
    gate = {"gate": "negative_flips", "max_rate": 0.1}
    assert names(ws, {**gate, "suites": "new"}, {"b"}, {"a"}) == ["b"]
    assert names(ws, {**gate, "suites": "learned"}, {"b"}, {"a"}) == ["a", "manners"]
    assert names(ws, {**gate, "suites": "all"}, {"b"}, {"a"}) == ["a", "b", "manners"]
    assert names(ws, {**gate, "suites": ["b", "a"]}, set(), set()) == ["a", "b"]
    assert names(ws, {**gate, "suites": "new"}, {"a"}, {"a"}) == []  # taught again is not new
    with pytest.raises(BadInput, match="unknown suite 'x'"):
        names(ws, {**gate, "suites": ["x"]}, set(), set())


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        (
            "magic",
            {},
            "unknown gate 'magic'; gates here: contamination, improvement, negative_flips, non_inferiority",
        ),
        ("non_inferiority", {}, "margin: field required"),
        ("negative_flips", {"max_rate": 1.5}, "max_rate"),
        ("improvement", {"confidence": 0.4}, "confidence"),
        ("improvement", {"min_gian": 0.1}, "min_gian: extra inputs"),
    ],
)
def test_gates_with_bad_arguments(name, arguments, told):
    with pytest.raises(BadInput, match=told):
        gates.build(name, arguments)


def test_a_task_without_a_suite_is_refused(ws):
    """It would drop out unseen: absent evidence never passes."""
    gate = {"gate": "non_inferiority", "margin": 0.1}
    with pytest.raises(BadInput, match="every learned task, and no suite tests y and z: add a suite"):
        names(ws, {**gate, "suites": "learned"}, {"b"}, {"a", "y", "z"})
    with pytest.raises(BadInput, match="every new task, and no suite tests z"):
        names(ws, {**gate, "suites": "new"}, {"b", "z"}, {"a"})
    assert names(ws, {**gate, "suites": ["a"]}, {"z"}, {"y"}) == ["a"]  # a team that names its suites knows


def test_what_the_champion_learned_meanwhile_is_guarded_too(ws, files):
    """v4 learned b and v5 c, both from v2: after v4's release v5 must not lose b unseen."""
    ws.add_suite("c", files / "c.yaml")
    ws.add_data("c", files / "c.jsonl")
    rival = ws.update("support", data=["c"], methods=acme.REPLAY_AND_EWC).version
    before = ws.propose(rival).record
    assert {g.suite for g in before.gates} == {"a", "c"}
    ws.promote("decision-3")
    after = ws.propose(rival).record
    asked = {(g.gate, g.suite): g.outcome for g in after.gates}
    assert {(g.gate, g.suite) for g in before.gates} < asked.keys()
    assert asked["non_inferiority", "b"] == "fail" and after.outcome == "fail"
    unplanned = decisions.propose(ws.store, "kim", ws.settings("support"), ws.evaluator(), rival, None)
    assert {(g.gate, g.suite) for g in unplanned.record.gates} == asked.keys() and unplanned.status == "fail"
    assert ws.verify().intact


@pytest.mark.parametrize("act", ["promote", "rollback"])
def test_nobody_waits_for_the_hashing_of_a_release(ws, monkeypatch, act):
    """A whole model is hashed before the write lock is taken, not under it."""
    original, other = rollout.check_bytes, sqlite3.connect(ws.root / ".meristem/meristem.db", timeout=0)

    def and_another_writes(*args):
        other.executescript("begin immediate; rollback")
        original(*args)

    monkeypatch.setattr(rollout, "check_bytes", and_another_writes)
    ws.promote("decision-3") if act == "promote" else ws.rollback("support")
    assert champion(ws) == (4 if act == "promote" else 1)
    other.close()


def test_a_champion_that_moves_during_the_hashing_wins(ws, monkeypatch):
    original = rollout.check_bytes

    def overtaken(*args):
        monkeypatch.undo()
        ws.promote("decision-3")
        original(*args)

    monkeypatch.setattr(rollout, "check_bytes", overtaken)
    with pytest.raises(StateMoved, match="the champion moved from v2 to v4"):
        ws.rollback("support")
    assert champion(ws) == 4 and len(ws.history("support")) == 2


def test_no_gate_is_no_evidence():
    assert decisions.overall([]) == "inconclusive"


def test_the_same_judgement_is_the_same_decision(ws):
    assert ws.propose("support@v4").id == "decision-3" and ws.propose("support@v3").id == "decision-2"
    assert len(ws.records("decision")) == 3


def test_promoting_twice_releases_once(ws):
    first = ws.promote("decision-3", "now")
    assert ws.promote("decision-3", "again").id == first.id and len(ws.history("support")) == 2


def test_a_failed_decision_is_never_promoted_nor_approved(ws):
    with pytest.raises(GateFailed, match="release explain decision-2"):
        ws.promote("decision-2")
    with pytest.raises(BadInput, match="only a passed decision"):
        ws.approve("decision-2")
    assert champion(ws) == 2


def test_rollback_step_by_step_and_to_a_name(ws):
    ws.promote("decision-3")
    assert ws.rollback("support").record.version == ws.version("support@v2").digest and champion(ws) == 2
    ws.rollback("support")
    assert champion(ws) == 1
    with pytest.raises(BadInput, match="no earlier champion"):
        ws.rollback("support")
    ws.rollback("support", to="support@v4")  # forward again: it was champion before
    assert champion(ws) == 4
    with pytest.raises(BadInput, match="support@v4 is the champion already"):
        ws.rollback("support", to="support@v4")
    with pytest.raises(BadInput, match="support@v3 was never the champion"):
        ws.rollback("support", to="support@v3")
    assert [e.record.kind for e in ws.history("support")] == ["promote", "promote", *["rollback"] * 3]
    assert ws.verify().intact


def test_promotion_after_a_rollback_needs_a_new_decision(ws):
    """The old decision was about another moment; a new one, from stored evaluations, costs nothing."""
    ws.promote("decision-3")
    ws.rollback("support")
    with pytest.raises(StateMoved, match="the champion moved away from v2 and back"):
        ws.promote("decision-3")
    measured = len(ws.evaluations())
    decision = ws.propose("support@v4")
    assert decision.id == "decision-4" and len(ws.evaluations()) == measured
    ws.promote(decision)
    assert champion(ws) == 4


# What a release reads does not grow with the decisions, approvals and releases before it


def crowd(ws, count):
    """``count`` decisions of the past, each approved and released."""
    record = ws.record("decision-3").as_(Decision)
    with ws.store.transaction("lee") as tx:
        for revision in range(100, 100 + count):
            past = record.model_copy(update={"champion_revision": revision})
            decision = ledger.open_record(tx, "decision", past, "support", "pass")
            approval = Approval(decision=decision.digest, actor=f"actor-{revision}", reason="")
            ledger.open_record(tx, "approval", approval, "support", "given")
            release = Release(
                model="support",
                kind="promote",
                version=record.version,
                previous=record.champion,
                revision=revision,
                decision=decision.digest,
            )
            ledger.open_record(tx, "release", release, "support", "done")


def another(ws, name, **changes):
    """A record as the one called ``name``, opened now."""
    old = ws.record(name)
    with ws.store.transaction("lee") as tx:
        new = old.record.model_copy(update=changes)
        return ledger.open_record(tx, old.kind, new, "support", old.status)


def approved(ws):
    decision = another(ws, "decision-3", approvals_needed=1)
    return lambda: decisions.approve(ws.store, "kim", decision, "good").id


def promoted(ws):
    decision = another(ws, "decision-3", approvals_needed=1)
    ws.approve(decision.id)
    return lambda: rollout.promote(ws.store, "kim", decision).kind


def proposed(ws):
    settings, evaluator, version = ws.settings("support"), ws.evaluator(), ws.version("support@v4")
    return lambda: ws.explain(decisions.propose(ws.store, "kim", settings, evaluator, version, None).id)


def asked(ws):
    plan, version = another(ws, "plan-3", attempt=9), ws.version("support@v4")
    return lambda: rollout.is_released(ws.store, plan, version)


@pytest.mark.parametrize("act", [proposed, approved, promoted, asked])
def test_the_past_does_not_slow_a_release(grown, tmp_path, act):
    counts = []
    for past in (1, 50):
        shutil.copytree(grown, tmp_path / f"past-{past}")
        ws = ms.Workspace.open(tmp_path / f"past-{past}", actor="kim")
        crowd(ws, past)
        run, seen = act(ws), []
        sql_event.listen(
            ws.store.database.engine, "after_cursor_execute", lambda *a, seen=seen: seen.append(a[2])
        )
        assert run() is not None
        counts.append(len(seen))
        ws.close()
    assert counts[0] == counts[1]


def test_equal_documents_are_found_by_their_index(ws):
    entry, seen = ws.record("decision-3"), []
    listen = sql_event.listens_for(ws.store.database.engine, "before_cursor_execute")
    listen(lambda *a: seen.append((a[2], a[3])))
    with ws.store.database.read() as connection:
        assert ledger.entries(connection, "decision", digest=entry.digest) == [entry]
        (query,) = [(text, values) for text, values in seen if "FROM records" in text]
        (plan,) = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query[0]}", query[1]).all()
    assert "ix_records_document" in plan[-1]


def test_approvals_are_counted_once_per_actor_and_only_for_their_decision(ws):
    crowd(ws, 2)
    decision = another(ws, "decision-3", approvals_needed=2)
    crowd(ws, 3)
    for actor, reason in (("sam", "good"), ("kim", "fine"), ("sam", "once more")):
        decisions.approve(ws.store, actor, decision, reason)
    with ws.store.database.read() as connection:
        assert decisions.approvers(connection, decision) == ("sam", "kim")
        assert decisions.approvers(connection, ws.record("decision-3")) == ()


def test_a_plan_released_its_version_even_when_that_was_taken_back(ws):
    plan, version = ws.record("plan-3"), ws.version("support@v4")
    assert not rollout.is_released(ws.store, plan, version)
    ws.promote("decision-3")
    assert rollout.is_released(ws.store, plan, version)
    ws.rollback("support")
    assert rollout.is_released(ws.store, plan, version)
    assert not rollout.is_released(ws.store, ws.record("plan-2"), version)


def test_a_version_of_another_model_cannot_be_rolled_back_to(ws):
    with pytest.raises(BadInput, match="base@v1 was never the champion of support"):
        ws.rollback("support", to="base@v1")


def test_a_rollback_that_expects_a_revision_is_safe_to_repeat(ws):
    ws.promote(ws.propose("support@v4"))
    revision = ws.alias_history("support", "champion")[-1].revision
    ws.rollback("support", expected=revision)
    before = champion(ws)
    with pytest.raises(StateMoved, match=f"is at revision {revision + 1}, not {revision}"):
        ws.rollback("support", expected=revision)
    assert champion(ws) == before


def test_a_repacking_beside_a_promotion_is_no_tampering(ws, monkeypatch):
    """The places that were looked up are gone when the bytes are read; the new ones are looked up then."""
    decision, locations, calls = ws.propose("support@v4"), ws.store.locations, []

    def moved_meanwhile(digests):
        found = locations(digests)
        calls.append(1)
        gone = {d: dataclasses.replace(p, pack="sha256:" + "0" * 64) for d, p in found.items()}
        return gone if len(calls) == 1 else found

    monkeypatch.setattr(ws.store, "locations", moved_meanwhile)
    ws.promote(decision)
    assert champion(ws) == 4 and len(calls) > 1
