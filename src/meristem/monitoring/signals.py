"""Signals: what starts a turn of the loop."""

from __future__ import annotations

from typing import Any, get_args

from meristem.ecosystem import ledger
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import Decision, Plan, Signal, SignalKind
from meristem.errors import BadInput
from meristem.store.store import Store, Transaction

KINDS: tuple[str, ...] = get_args(SignalKind)


def add(
    store: Store,
    actor: str,
    *,
    kind: str,
    model: str,
    data: list[str] | None = None,
    note: str = "",
    details: dict[str, Any] | None = None,
) -> Entry:
    """Record a signal. ``data`` are digests of data sets. Raises ``BadInput`` for an unknown kind."""
    if kind not in KINDS:
        raise BadInput(f"unknown signal kind '{kind}'; kinds: {', '.join(KINDS)}")
    if kind == "new-data" and not data:
        raise BadInput("a new-data signal needs --data NAME")
    record = Signal.model_validate(
        {"kind": kind, "model": model, "data": data or [], "note": note, "details": details or {}}
    )
    with store.transaction(actor, note or f"{kind} for {model}") as tx:
        return ledger.open_record(tx, "signal", record, model, status="pending")


def close(store: Store, actor: str, signal: Entry, reason: str) -> None:
    """Take a pending signal back. Raises ``BadInput`` for one that was answered already."""
    signal.as_(Signal)
    with store.transaction(actor, reason or f"{signal.id} taken back") as tx:
        now = ledger.find(tx.connection, signal.id)
        if now.status != "pending":
            closing = "; close its plan (`meristem plan close`)" if now.status == "planned" else ""
            raise BadInput(f"{signal.id} is {now.status}; only a pending signal can be closed{closing}")
        ledger.set_status(tx, signal, "closed")


def regression(tx: Transaction, plan: Plan, decision: Entry, attempts: int) -> Entry | None:
    """The regression signal that a failed decision emits, or None when its attempts are used up."""
    if plan.attempt >= attempts:
        return None
    record = decision.as_(Decision)
    failed = [f"{gate.gate} on {gate.suite}" for gate in record.gates if gate.outcome != "pass"]
    signal = Signal(
        kind="regression",
        model=plan.model,
        data=plan.data,
        note=f"{decision.id} did not pass: {', '.join(failed)}",
        cause=decision.digest,
        details={"attempt": plan.attempt},
    )
    return ledger.open_record(tx, "signal", signal, plan.model, status="pending")
