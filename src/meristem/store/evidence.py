"""Evidence: the append-only, hash-chained log of everything that changed the workspace.

An event is one canonical JSON object; its stored bytes are what is hashed, columns only index them::

    {"schema": "meristem/event/v1", "sequence": 7, "previous": "sha256:...", "kind": "alias.moved",
     "actor": "kim", "time": "2026-11-22T18:01:59.123456Z", "tool": "meristem 0.1.0",
     "subject": "sha256:...", "reason": "...", "data": {...}}

Events hold digests, names and numbers, never training text. The chain alone does not notice a cut tail or a
complete recompute: keep the head (``log show --head``) outside the workspace to catch those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, LargeBinary, cast, insert, select

from meristem._version import __version__
from meristem.errors import Tampered
from meristem.store.canonical import PREFIX, canonical, digest_bytes, parse
from meristem.store.schema import events

SCHEMA = "meristem/event/v1"
GENESIS = PREFIX + "0" * 64


@dataclass(frozen=True)
class Event:
    sequence: int
    previous: str
    kind: str
    actor: str
    time: str
    tool: str
    subject: str
    reason: str
    data: dict[str, Any]
    hash: str

    @classmethod
    def from_body(cls, body: bytes) -> Event:
        fields = parse(body)
        if not isinstance(fields, dict) or fields.pop("schema", None) != SCHEMA:
            raise Tampered(f"not a {SCHEMA} document")
        return cls(**fields, hash=digest_bytes(body))


def head(connection: Connection) -> tuple[int, str]:
    """Sequence number and hash of the newest event; ``(0, GENESIS)`` for an empty log."""
    row = connection.execute(
        select(events.c.sequence, events.c.hash).order_by(events.c.sequence.desc()).limit(1)
    ).first()
    return (row.sequence, row.hash) if row else (0, GENESIS)


def append(
    connection: Connection, *, kind: str, subject: str, actor: str, reason: str, data: dict[str, Any]
) -> Event:
    """Append one event inside the caller's transaction."""
    sequence, previous = head(connection)
    fields = {
        "schema": SCHEMA,
        "sequence": sequence + 1,
        "previous": previous,
        "kind": kind,
        "actor": actor,
        "time": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "tool": f"meristem {__version__}",
        "subject": subject,
        "reason": reason,
        "data": data,
    }
    body = canonical(fields)
    event = Event.from_body(body)
    connection.execute(
        insert(events).values(sequence=event.sequence, hash=event.hash, kind=kind, subject=subject, body=body)
    )
    return event


def read(connection: Connection, *, after: int = 0, kind: str | None = None) -> Iterator[Event]:
    query = select(events.c.body).where(events.c.sequence > after).order_by(events.c.sequence)
    if kind is not None:
        query = query.where(events.c.kind == kind)
    for row in connection.execute(query):
        yield Event.from_body(row.body)


def check_chain(connection: Connection) -> Iterator[tuple[int, Event | None, str | None]]:
    """Walk the chain: yields ``(sequence, event, problem)``; ``problem`` is None for a good event."""
    previous, expected = GENESIS, 1
    columns = (events.c.sequence, events.c.hash, events.c.kind, events.c.subject)
    stored = cast(events.c.body, LargeBinary).label("body")  # whatever type somebody gave it
    for row in connection.execute(select(*columns, stored).order_by(events.c.sequence)):
        event, problem = None, None
        try:
            event = Event.from_body(row.body)
        except (ValueError, TypeError, RecursionError, Tampered) as error:
            problem = f"the event cannot be read ({error})"
        if event is not None:
            if digest_bytes(row.body) != row.hash:
                problem = "the event's bytes do not match its hash"
            elif (event.sequence, row.sequence) != (expected, expected):
                problem = f"expected event {expected} here"
            elif event.previous != previous:
                problem = "the chain is broken: it does not follow the event before it"
            elif (event.kind, event.subject) != (row.kind, row.subject):
                problem = "the event's index columns do not match its bytes"
        yield row.sequence, event, problem
        previous, expected = row.hash, row.sequence + 1  # a gap is one problem, not one per later event
