"""Decisions: one verdict on one version against one champion, with every gate's numbers."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from meristem.config import ModelSettings
from meristem.ecosystem import aliases, ledger, retirement, versions
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import Approval, Criterion, Decision, GateResult, Outcome, Plan
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, StateMoved
from meristem.evaluation.service import Evaluator
from meristem.release import criteria as criteria_room
from meristem.release import gates
from meristem.release.cases import GateCase, Measured
from meristem.store.store import Store


@dataclass(frozen=True)
class _Case:
    """What is judged: candidate, champion with its revision, the criteria, and the policy that set them."""

    version: VersionEntry
    champion: VersionEntry
    revision: int
    criteria: list[Criterion]
    suites: dict[str, AssetEntry]
    policy: ModelSettings


def propose(
    store: Store,
    actor: str,
    settings: ModelSettings,
    evaluator: Evaluator,
    version: VersionEntry,
    plan: Entry | None,
) -> Entry:
    """Judge ``version`` against the present champion of its model and record the decision.

    With a plan, its policy, criteria and suites are used exactly as they were fixed before training; what a
    champion that moved meanwhile has learned is guarded as well. Judging the same version against the same
    champion under the same policy again gives the same decision.
    """
    case = _case(store, settings, version, plan)
    results, evaluations = _judge_all(evaluator, case)
    decision = Decision(
        model=version.model,
        version=version.digest,
        champion=case.champion.digest,
        champion_revision=case.revision,
        plan=plan.digest if plan else None,
        policy="",
        evaluations=evaluations,
        gates=results,
        outcome=overall(results),
        approvals_needed=case.policy.approvals,
    )
    with store.transaction(actor, f"{version.label} judged against {case.champion.label}") as tx:
        decision = decision.model_copy(update={"policy": tx.add_document(case.policy.policy())})
        if found := ledger.entries(tx.connection, "decision", digest=decision.digest):
            return found[0]
        return ledger.open_record(tx, "decision", decision, version.model, status=decision.outcome)


def overall(results: list[GateResult]) -> Outcome:
    """Pass only if every gate passed; no gate at all is no evidence, and absent evidence never passes."""
    outcomes = {result.outcome for result in results}
    if "fail" in outcomes:
        return "fail"
    return "pass" if outcomes == {"pass"} else "inconclusive"


def approve(store: Store, actor: str, decision: Entry, reason: str) -> Entry:
    """Record ``actor``'s approval; the same actor twice counts once.

    Raises ``BadInput`` for a decision that did not pass, ``StateMoved`` when the champion is no longer the one that
    it was judged against.
    """
    record = decision.as_(Decision)
    if record.outcome != "pass":
        raise BadInput(f"{decision.id} is {record.outcome}; only a passed decision can be approved")
    approval = Approval(decision=decision.digest, actor=actor, reason=reason)
    with store.transaction(actor, reason or f"approved {decision.id}") as tx:
        if aliases.champion(tx.connection, record.model).revision != record.champion_revision:
            raise StateMoved(f"{decision.id} is void: the champion moved since; propose the version again")
        for entry in _approvals(tx.connection, decision):
            if entry.as_(Approval).actor == actor:
                return entry
        return ledger.open_record(tx, "approval", approval, record.model, status="given")


def approvers(connection: Connection, decision: Entry) -> tuple[str, ...]:
    """Who approved a decision, each once."""
    return tuple(dict.fromkeys(entry.as_(Approval).actor for entry in _approvals(connection, decision)))


def _approvals(connection: Connection, decision: Entry) -> list[Entry]:
    given = ledger.opened_after(connection, "approval", decision)
    return [entry for entry in given if entry.as_(Approval).decision == decision.digest]


def _case(store: Store, settings: ModelSettings, version: VersionEntry, plan: Entry | None) -> _Case:
    with store.database.read() as connection:
        champion = aliases.champion(connection, version.model)
        retirement.refuse(connection, version.digest)
        if champion.version == version.digest:
            raise BadInput(f"{version.label} is the champion already; there is nothing to decide")
        entry = versions.by_digest(connection, champion.version)
        if plan is not None:
            settings = criteria_room.policy_of(connection, plan.as_(Plan), settings)
            criteria, suites = criteria_room.for_plan(connection, settings, plan.as_(Plan), entry)
        else:
            criteria, suites = criteria_room.for_version(connection, settings, version, entry)
        if not any(map(criteria_room.compares, criteria)):
            raise BadInput(
                f"no gate of model {version.model} compares it with the champion on any suite, and absent evidence never passes: "
                "add suites for its tasks (`meristem suite add`) or name suites in meristem.yaml"
            )
    return _Case(version, entry, champion.revision, criteria, suites, settings)


def _judge_all(evaluator: Evaluator, case: _Case) -> tuple[list[GateResult], list[str]]:
    """Every criterion's result, and the evaluations that they rest on."""
    names = list(dict.fromkeys(criterion.suite for criterion in case.criteria))
    compared = {criterion.suite for criterion in case.criteria if criteria_room.compares(criterion)}
    others = {criterion.suite for criterion in case.criteria if not criteria_room.compares(criterion)}
    evidence = Measured(evaluator, [case.suites[name] for name in names if name in others])
    # One model in memory at a time: all suites of the champion first, then all of the candidate.
    for version in (case.champion, case.version):
        for name in names:
            if name in compared:
                evidence.evaluate(version, case.suites[name])
    results = []
    for name in names:
        asked = GateCase(case.version, case.champion, case.suites[name], evidence)
        for criterion in (c for c in case.criteria if c.suite == name):
            results.append(gates.judge(criterion.gate, criterion.arguments, asked))
    return results, evidence.used
