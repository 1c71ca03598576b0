"""One turn of the loop, start to end: signals -> plan -> update -> evaluation -> decision -> release.

Every stage is stored before the next begins and finds its earlier result: a turn cut off is run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meristem.ecosystem import ledger
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import Decision, Plan
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, StateMoved, TrainingFailed
from meristem.monitoring import signals
from meristem.release import gates, rollout

if TYPE_CHECKING:
    from meristem.workspace import Workspace


@dataclass(frozen=True)
class Turn:
    """What one turn did. ``outcome``: released, stopped (gates did not pass), waiting (nothing to train on yet
    or approvals missing). ``unfinished``: the plan stays open and the next turn goes on with it."""

    outcome: str
    reason: str
    plan: Entry
    version: VersionEntry | None = None
    decision: Entry | None = None
    next_signal: Entry | None = None
    unfinished: bool = False


def turn(ws: Workspace, model: str) -> Turn | None:
    """Answer the oldest pending signal of ``model``; None when there is nothing to do."""
    if (plan := ws.plan(model)) is None:
        return None
    record = plan.as_(Plan)
    if record.action == "wait":
        _close(ws, plan, "closed", record.reason)
        return Turn("waiting", record.reason, plan)
    try:
        update = ws.run_plan(plan)
        if rollout.is_released(ws.store, plan, update.version):
            _close(ws, plan, "done", f"{update.version.label} was released")
            return Turn("released", f"{update.version.label} was released already", plan, update.version)
        decision = ws.propose(update.version, plan=plan)
    except (TrainingFailed, BadInput) as error:
        _close(ws, plan, "failed", str(error))
        raise
    if not decision.passed:
        return _stop(ws, plan, update.version, decision.entry)
    if decision.approvals_missing:
        reason = f"{decision.id} passed and waits for approval"
        return Turn("waiting", reason, plan, update.version, decision.entry, unfinished=True)
    if (now := ws.record(plan.id).status) != "open":
        raise StateMoved(f"{plan.id} was set to {now} meanwhile; {decision.id} is not released")
    ws.promote(decision.id)
    _close(ws, plan, "done", f"{decision.id} passed and was released")
    return Turn("released", f"{decision.id} passed every gate", plan, update.version, decision.entry)


def _stop(ws: Workspace, plan: Entry, version: VersionEntry, decision: Entry) -> Turn:
    """Close the plan; a regression signal asks for another attempt while there are any left."""
    record = decision.as_(Decision)
    reason = "; ".join(f"{g.gate} on {g.suite}: {g.reason}" for g in record.gates if g.outcome != "pass")
    with ws.store.transaction(ws.actor, reason) as tx:
        # Inconclusive wants more test items, and a test item among the training data wants cleaner data.
        attempts = ws.settings(record.model).attempts if any(map(gates.regressed, record.gates)) else 0
        signal = signals.regression(tx, plan.as_(Plan), decision, attempts)
        ledger.set_status(tx, plan, "stopped", expected="open")
    return Turn("stopped", reason, plan, version, decision, signal)


def _close(ws: Workspace, plan: Entry, status: str, reason: str) -> None:
    with ws.store.transaction(ws.actor, reason) as tx:
        ledger.set_status(tx, plan, status, expected="open")
