"""Evidence: the append-only, hash-chained log of everything that changed the workspace.

An event is one canonical JSON object; its stored bytes are what is hashed, columns only index them::

    {"schema": "meristem/event/v1", "sequence": 7, "previous": "sha256:...", "kind": "alias.moved",
     "actor": "kim", "time": "2026-11-22T18:01:59.123456Z", "tool": "meristem 0.1.0",
     "subject": "sha256:...", "reason": "...", "data": {...}}

Events hold digests, names and numbers, never training text. The chain alone does not notice a cut tail or a
complete recompute: ``checkpoints`` signs its head and keeps that outside the workspace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, LargeBinary, cast, insert, select

from meristem._version import __version__
from meristem.errors import Tampered
from meristem.store.canonical import PREFIX, canonical, digest_bytes, parse
from meristem.store.schema import events

SCHEMA = "meristem/event/v1"
GENESIS = PREFIX + "0" * 64
_AT_ONCE = 1000  # rows fetched at once: memory stays flat however long the log is


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


def newest(connection: Connection, count: int) -> list[Event]:
    """The last ``count`` events, oldest first."""
    bodies = connection.scalars(select(events.c.body).order_by(events.c.sequence.desc()).limit(count)).all()
    return [Event.from_body(body) for body in reversed(bodies)]


def hash_at(connection: Connection, sequence: int) -> str | None:
    return connection.scalar(select(events.c.hash).where(events.c.sequence == sequence))


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
    for row in connection.execute(query.execution_options(yield_per=_AT_ONCE)):
        yield Event.from_body(row.body)


class Link(NamedTuple):
    """One place in the chain. ``problem`` is None for a good event, ``event`` for one that cannot be read.

    ``first`` is the first event that may be to blame: two that do not fit together look the same, whichever of
    them was altered.
    """

    sequence: int
    event: Event | None
    problem: str | None
    first: int


def check_chain(connection: Connection) -> Iterator[Link]:
    """Walk the chain, one ``Link`` per event; a gap is one more, however many events are missing there."""
    previous: str | None = GENESIS
    expected = 1
    columns = (events.c.sequence, events.c.hash, events.c.kind, events.c.subject)
    stored = cast(events.c.body, LargeBinary).label("body")  # whatever type somebody gave it
    query = select(*columns, stored).order_by(events.c.sequence)
    for row in connection.execute(query.execution_options(yield_per=_AT_ONCE)):
        sequence, hash_, kind, subject, body = row
        if sequence > expected:
            yield Link(expected, None, f"missing; the next one in the log is event {sequence}", expected)
            previous = None  # whatever it was
        try:
            event = Event.from_body(body)
        except (ValueError, TypeError, RecursionError, Tampered) as error:
            yield Link(sequence, None, f"the event cannot be read ({error})", sequence)
        else:
            yield _link(event, (sequence, hash_, kind, subject), expected, previous)
        previous, expected = hash_, max(sequence, expected) + 1


def _link(event: Event, row: tuple[int, str, str, str], expected: int, previous: str | None) -> Link:
    """How ``event``, kept in ``row``, fits behind the event with the hash ``previous`` (None: it is not known)."""
    sequence, hash_, kind, subject = row
    if event.hash != hash_:
        return Link(sequence, event, "the event's bytes do not match its hash", sequence)
    if event.sequence != sequence or sequence < expected:
        return Link(sequence, event, f"it says that it is event {event.sequence}", sequence)
    if previous is not None and event.previous != previous:
        problem = f"the chain is broken: it does not follow event {sequence - 1}; one of the two was altered"
        return Link(sequence, event, problem, max(1, sequence - 1))
    if (event.kind, event.subject) != (kind, subject):
        return Link(sequence, event, "the event's index columns do not match its bytes", sequence)
    return Link(sequence, event, None, sequence)
