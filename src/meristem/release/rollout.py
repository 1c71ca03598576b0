"""Promotion and rollback: evidence, record and pointer in one transaction, or none of them."""

from __future__ import annotations

from sqlalchemy import Connection

from meristem.ecosystem import aliases, ledger, retirement, versions
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import Decision, Release
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, GateFailed, Inconclusive, StateMoved, Tampered
from meristem.release.decisions import approvers
from meristem.store.store import Store


def promote(store: Store, actor: str, decision: Entry, reason: str = "") -> Entry:
    """Make the decided version the champion.

    Raises ``GateFailed`` or ``Inconclusive`` when the decision did not pass, ``BadInput`` when approvals are
    missing, ``StateMoved`` when the champion is no longer the one it was judged against. Promoting the same
    decision twice releases once.
    """
    record = decision.as_(Decision)
    if record.outcome == "fail":
        raise GateFailed(f"{decision.id} failed its gates; `meristem release explain {decision.id}` says why")
    if record.outcome == "inconclusive":
        raise Inconclusive(
            f"{decision.id} is inconclusive; `meristem release explain {decision.id}` says what is missing"
        )
    with store.database.read() as connection:  # hashing takes long: nobody else's writing waits for it
        if done := _release_of(connection, decision):
            return done
        _check_approvals(connection, decision)
        aliases.check_actor(connection, record.model, aliases.CHAMPION, actor)
        check_bytes(store, connection, versions.by_digest(connection, record.version))
    with store.transaction(actor, reason or f"{decision.id} passed") as tx:
        if done := _release_of(tx.connection, decision):
            return done
        moved = aliases.move(tx, record.model, aliases.CHAMPION, record.version, record.champion_revision)
        release = Release(
            model=record.model,
            kind="promote",
            version=record.version,
            previous=record.champion,
            revision=moved.revision,
            decision=decision.digest,
            reason=reason,
        )
        return ledger.open_record(tx, "release", release, record.model, status="done")


def rollback(
    store: Store,
    actor: str,
    model: str,
    to: VersionEntry | None = None,
    reason: str = "",
    expected: int | None = None,
) -> Entry:
    """Point the champion back at a version that was champion before (by default the one before this).

    The version's bytes are checked first; nothing is recomputed, unmerged or fetched. Each call without ``to``
    goes one release further back; with ``to``, a repetition is refused. Raises ``StateMoved`` when somebody else
    moves the champion meanwhile, or its revision is not ``expected``.
    """
    with store.database.read() as connection:
        aliases.check_actor(connection, model, aliases.CHAMPION, actor)
        champion = aliases.champion(connection, model)
        if expected not in (None, champion.revision):
            raise StateMoved(
                f"{model}@champion is at revision {champion.revision}, not {expected}; "
                f"look at `meristem release history {model}`"
            )
        target = to.digest if to else _before(connection, model, champion.version)
        if target == champion.version:
            raise BadInput(
                f"{to.label if to else model} is the champion already; there is nothing to roll back"
            )
        if not aliases.was_at(connection, model, aliases.CHAMPION, target):
            raise BadInput(
                f"{to.label if to else target} was never the champion of {model}; promote it with a decision"
            )
        check_bytes(store, connection, versions.by_digest(connection, target))
    with store.transaction(actor, reason or f"rollback of {model}") as tx:
        moved = aliases.move(tx, model, aliases.CHAMPION, target, champion.revision)
        release = Release(
            model=model,
            kind="rollback",
            version=target,
            previous=champion.version,
            revision=moved.revision,
            decision=None,
            reason=reason,
        )
        return ledger.open_record(tx, "release", release, model, status="done")


def is_released(store: Store, plan: Entry, version: VersionEntry) -> bool:
    """Whether ``version`` is the champion, or a decision of ``plan`` released it (and it was taken back since)."""
    with store.database.read() as connection:
        return _is_released(connection, plan, version)


def _is_released(connection: Connection, plan: Entry, version: VersionEntry) -> bool:
    if aliases.champion(connection, version.model).version == version.digest:
        return True
    for entry in ledger.opened_after(connection, "release", plan):
        release = entry.as_(Release)
        if release.decision and release.version == version.digest:
            decision = ledger.by_digest(connection, "decision", release.decision)
            if decision.as_(Decision).plan == plan.digest:
                return True
    return False


def check_bytes(store: Store, connection: Connection, version: VersionEntry) -> None:
    """Raises ``Tampered`` unless every tensor and file of the version (its base's included) is intact, ``BadInput``
    when they were given up."""
    retirement.refuse(connection, version.digest)
    digest: str | None = version.content
    while digest:
        content = versions.content_of(connection, digest)
        try:
            store.placed({*content.tensors.values(), *content.files.values()}, store.check_places)
        except (BadInput, Tampered) as error:
            raise Tampered(
                f"{version.label}: a blob is missing or altered ({error}); `meristem log verify` lists all"
            ) from error
        digest = content.base


def _release_of(connection: Connection, decision: Entry) -> Entry | None:
    """The release that ``decision`` made, while the champion still is where it put it."""
    champion = aliases.champion(connection, decision.model)
    for entry in ledger.entries(connection, "release", model=decision.model, last=1):
        release = entry.as_(Release)
        if release.decision == decision.digest and release.revision == champion.revision:
            return entry
    return None


def _before(connection: Connection, model: str, champion: str) -> str:
    """The champion that the latest promotion of the present one replaced."""
    for entry in ledger.newest_first(connection, "release", model):
        release = entry.as_(Release)
        if release.kind == "promote" and release.version == champion:
            return release.previous
    raise BadInput(f"model {model} has no earlier champion to roll back to")


def _check_approvals(connection: Connection, decision: Entry) -> None:
    record = decision.as_(Decision)
    actors = approvers(connection, decision)
    if len(actors) < record.approvals_needed:
        raise BadInput(
            f"{decision.id} needs {record.approvals_needed} approvals and has {len(actors)}; "
            f"ask for `meristem release approve {decision.id}`"
        )
