"""Versions and assets whose bytes were given up: by a retention rule, or for good on a privacy request.

The table ``retired`` says what is given up at this moment, and by which event: ``version.retired``,
``asset.retired`` or ``asset.deleted``. Documents and events stay, so that everything can still be explained. Who stores
the bytes of something retired again brings it back (``version.restored``, ``asset.restored``); what was deleted
stays deleted.
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Connection, delete, insert, select

from meristem.errors import BadInput
from meristem.store.evidence import Event
from meristem.store.schema import events, retired
from meristem.store.store import Transaction

Noun = Literal["version", "asset"]
RETIRED, DELETED, RESTORED = "retired", "deleted", "restored"


def give_up(
    tx: Transaction, noun: Noun, digest: str, verb: str, reason: str, *, label: str, kind: str, **data: Any
) -> Event:
    """Record that the bytes of ``digest`` go. Whoever calls this makes them go."""
    event = tx.append(f"{noun}.{verb}", digest, reason=reason, label=label, kind=kind, **data)
    tx.connection.execute(delete(retired).where(retired.c.digest == digest))
    tx.connection.execute(insert(retired).values(digest=digest, event=event.sequence))
    return event


def restore(tx: Transaction, noun: Noun, digest: str) -> None:
    """Record that the bytes of ``digest`` are there again, if they had been given up.

    Raises ``BadInput`` when they were deleted on a request.
    """
    refuse_deleted(tx.connection, digest)
    found = event_of(tx.connection, digest)
    if found is None:
        return
    tx.append(f"{noun}.{RESTORED}", digest, label=found.data["label"], kind=found.data["kind"])
    tx.connection.execute(delete(retired).where(retired.c.digest == digest))


def all_given_up(connection: Connection) -> set[str]:
    """The digest of every version and asset that is given up."""
    return set(connection.scalars(select(retired.c.digest)))


def all_deleted(connection: Connection) -> set[str]:
    """Those that were deleted for good."""
    query = select(retired.c.digest).join(events, events.c.sequence == retired.c.event)
    return set(connection.scalars(query.where(events.c.kind == f"asset.{DELETED}")))


def event_of(connection: Connection, digest: str) -> Event | None:
    """The event that gave ``digest`` up; None for what is still there."""
    query = select(events.c.body).join(retired, retired.c.event == events.c.sequence)
    body = connection.scalar(query.where(retired.c.digest == digest))
    return None if body is None else Event.from_body(body)


def refuse(connection: Connection, *digests: str) -> None:
    """Raises ``BadInput`` naming the event if the bytes of one of ``digests`` were given up."""
    for digest in digests:
        if found := event_of(connection, digest):
            raise _refusal(found)


def refuse_deleted(connection: Connection, digest: str) -> None:
    """Raises ``BadInput`` if ``digest`` was deleted for good: look before its bytes are stored again."""
    found = event_of(connection, digest)
    if found and found.kind.endswith(DELETED):
        raise _refusal(found)


def told(event: Event) -> str:
    """``deleted by event 12 (why)``"""
    return f"{event.kind.partition('.')[2]} by event {event.sequence} ({event.reason})"


def _refusal(event: Event) -> BadInput:
    label, kind = event.data["label"], event.data["kind"]
    what = {"dataset": f"data {label}", "suite": f"suite {label}"}.get(kind, label)
    return BadInput(f"{what} was {told(event)}: its bytes are gone; use another")
