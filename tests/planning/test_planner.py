"""Plans: what becomes of pending signals, and what a plan refuses to be."""

from __future__ import annotations

import pytest
from tests import acme

import meristem as ms
from meristem.ecosystem.records import Plan
from meristem.errors import BadInput, StateMoved
from meristem.planning import planner


@pytest.fixture
def ws(fresh):
    ws = ms.Workspace.open(fresh, actor="kim")
    yield ws
    ws.close()


def test_signals_of_new_data_go_together_and_others_one_by_one(ws):
    ws.signal("new-data", "support", data=["a"])
    ws.signal("incident", "support", data=["b"], note="wrong")
    ws.signal("new-data", "support", data=["b"])
    plan = ws.plan("support").as_(Plan)
    assert len(plan.signals) == 2 and len(plan.data) == 2
    assert [e.status for e in ws.records("signal")] == ["planned", "pending", "planned"]


def test_a_manual_plan_is_not_the_loops(ws):
    """`update run` makes its own plan; the loop neither carries it out nor waits for it."""
    ws.update("support", data=["a"], recipe={"max_steps": 2})
    assert ws.records("plan")[0].status == "manual" and ws.plan("support") is None


def test_the_budget_follows_the_recipe(fresh):
    acme.configure(fresh, attempts="1")
    text = (fresh / "meristem.yaml").read_text().replace("max_steps: 30, ", "epochs: 2, ")
    (fresh / "meristem.yaml").write_text(text)
    ws = ms.Workspace.open(fresh)
    ws.signal("new-data", "support", data=["a"])
    assert ws.plan("support").as_(Plan).budget == {"new_rows": 16, "epochs": 2.0, "max_steps": None}
    ws.close()


def test_a_plan_that_trains_nothing_cannot_be_run(ws):
    ws.signal("base-upgrade", "support")
    with pytest.raises(BadInput, match="plan-1 trains nothing: rebasing"):
        ws.run_plan(ws.plan("support"))


def test_every_task_that_a_gate_asks_about_needs_a_suite(ws, files):
    """Else the update would ship with nobody having looked at task c: refused before it is trained."""
    ws.add_data("c", files / "c.jsonl")
    ws.signal("new-data", "support", data=["b", "c"])
    with pytest.raises(
        BadInput, match=r"gate improvement .* every new task.* add a suite with a task named c "
    ):
        ws.plan("support")
    assert ws.records("plan") == [] and ws.records("signal")[0].status == "pending"
    ws.add_suite("c", files / "c.yaml")
    assert {c.suite for c in ws.plan("support").as_(Plan).criteria} == {"b", "c"}


def between(monkeypatch, act):
    """``act`` happens after the planner read the signals and before it stores its plan."""
    original = planner._plan

    def and_then(*args):
        made = original(*args)
        monkeypatch.undo()
        act()
        return made

    monkeypatch.setattr(planner, "_plan", and_then)


def test_a_signal_closed_meanwhile_is_not_planned(ws, monkeypatch):
    ws.signal("new-data", "support", data=["a"])
    between(monkeypatch, lambda: ws.close_signal("signal-1", "a mistake"))
    with pytest.raises(StateMoved, match="signal-1 is closed by now, no longer pending"):
        ws.plan("support")
    assert ws.records("plan") == [] and ws.records("signal")[0].status == "closed"


def test_two_planners_make_one_plan(ws, monkeypatch):
    ws.signal("new-data", "support", data=["a"])
    between(monkeypatch, lambda: ws.plan("support"))
    assert ws.plan("support").id == "plan-1"
    assert len(ws.records("plan")) == 1 and sum(e.kind == "signal.planned" for e in ws.events()) == 1


def test_two_planners_that_saw_different_signals_make_one_plan(ws, monkeypatch):
    ws.signal("new-data", "support", data=["a"])

    def other():
        ws.signal("new-data", "support", data=["b"])
        ws.plan("support")

    between(monkeypatch, other)
    with pytest.raises(StateMoved, match="signal-1 is planned by now"):
        ws.plan("support")
    assert len(ws.records("plan")) == 1


def test_only_an_open_plan_is_closed(ws):
    ws.signal("new-data", "support", data=["a"])
    ws.plan("support")
    with pytest.raises(BadInput, match=r"signal-1 is planned.*close its plan \(`meristem plan close"):
        ws.close_signal("signal-1", "too late")
    assert ws.close_plan("plan-1", "the data was withdrawn").status == "closed"
    assert list(ws.events())[-1].reason == "the data was withdrawn" and ws.plan("support") is None
    with pytest.raises(BadInput, match="plan-1 is closed; only an open plan"):
        ws.close_plan("plan-1")
    with pytest.raises(BadInput, match="signal-1 is no plan"):
        ws.close_plan("signal-1")
    assert ws.verify().intact
