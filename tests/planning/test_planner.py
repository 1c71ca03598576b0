"""Plans: what becomes of pending signals, and what a plan refuses to be."""

from __future__ import annotations

import pytest
from tests import acme

import meristem as ms
from meristem.ecosystem.records import Plan
from meristem.errors import BadInput


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
