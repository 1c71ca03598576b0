"""Numbered records (signals, plans, updates, decisions, approvals, releases) and their status.

Each is one immutable document; its status is an index that the events can rebuild: ``KIND.opened`` carries the
number, ``KIND.STATUS`` every later change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Connection, Row, func, insert, select, update

from meristem.ecosystem import retirement
from meristem.ecosystem.records import (
    Approval,
    Decision,
    Plan,
    Record,
    Release,
    Signal,
    Update,
    references,
)
from meristem.errors import BadInput, StateMoved
from meristem.store.database import stream
from meristem.store.schema import events
from meristem.store.schema import records as table
from meristem.store.store import Transaction, read_document

KINDS: dict[str, type[Record]] = {
    "signal": Signal,
    "plan": Plan,
    "update": Update,
    "decision": Decision,
    "approval": Approval,
    "release": Release,
}

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Entry:
    """A record with its name for people (``update-3``), its status and what it led to (a digest)."""

    kind: str
    number: int
    model: str
    digest: str
    status: str
    result: str | None
    record: Record

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.number}"

    def as_(self, kind: type[R]) -> R:
        if not isinstance(self.record, kind):
            raise BadInput(f"{self.id} is no {kind.__name__.lower()}; give the id of one")
        return self.record


def open_record(tx: Transaction, kind: str, record: Record, model: str, status: str = "open") -> Entry:
    """Raises ``BadInput`` when ``record`` names a version or an asset whose bytes were given up."""
    retirement.refuse(tx.connection, *sorted(references(record.document())[0]))
    digest = tx.add_document(record.document())
    newest = tx.connection.scalar(select(func.max(table.c.number)).where(table.c.kind == kind)) or 0
    number = newest + 1
    tx.connection.execute(
        insert(table).values(kind=kind, number=number, model=model, document=digest, status=status)
    )
    tx.append(f"{kind}.opened", digest, number=number, model=model, status=status)
    return Entry(kind, number, model, digest, status, None, record)


def set_status(
    tx: Transaction,
    entry: Entry,
    status: str,
    result: str | None = None,
    reason: str | None = None,
    *,
    expected: str | None = None,
) -> None:
    """Raises ``StateMoved`` unless the record's status is ``expected`` (None: whatever it is) at this moment."""
    where = (table.c.kind == entry.kind) & (table.c.number == entry.number)
    now = tx.connection.scalar(select(table.c.status).where(where))
    if expected not in (None, now):
        raise StateMoved(f"{entry.id} is {now} by now, no longer {expected}; look at it and repeat")
    values = {"status": status} | ({"result": result} if result else {})
    tx.connection.execute(update(table).where(where).values(**values))
    tx.append(f"{entry.kind}.{status}", entry.digest, reason=reason, number=entry.number, result=result)


def find(connection: Connection, name: str) -> Entry:
    """The record called ``kind-number``. Raises ``BadInput`` when there is none."""
    kind, _, number = name.rpartition("-")
    if kind not in KINDS or not re.fullmatch(r"[0-9]{1,9}", number):
        raise BadInput(f"'{name}' is not a record id; they look like decision-1 or update-2")
    rows = entries(connection, kind, number=int(number))
    if not rows:
        newest = connection.scalar(select(func.max(table.c.number)).where(table.c.kind == kind))
        here = f"the newest is {kind}-{newest}" if newest else f"there is no {kind} yet"
        raise BadInput(f"there is no {name}; {here}")
    return rows[0]


def by_digest(connection: Connection, kind: str, digest: str) -> Entry:
    found = entries(connection, kind, digest=digest)
    if not found:
        raise BadInput(f"there is no {kind} {digest}")
    return found[-1]


def entries(
    connection: Connection,
    kind: str,
    *,
    model: str | None = None,
    status: str | None = None,
    number: int | None = None,
    digest: str | None = None,
    last: int | None = None,
) -> list[Entry]:
    """Records of ``kind``, oldest first; with ``last``, only that many of the newest."""
    query = select(table).where(table.c.kind == kind)
    if model is not None:
        query = query.where(table.c.model == model)
    if status is not None:
        query = query.where(table.c.status == status)
    if number is not None:
        query = query.where(table.c.number == number)
    if digest is not None:
        query = query.where(table.c.document == digest)
    if last is not None:
        query = query.order_by(table.c.number.desc()).limit(last)
    # Without ``last`` sorted here: for the sake of an order SQLite would leave the index of the digests unused.
    rows = sorted(connection.execute(query), key=lambda row: row.number)
    return [_entry(connection, row) for row in rows]


def newest_first(connection: Connection, kind: str, model: str) -> Iterator[Entry]:
    """Records of a model's line, for whoever looks for the newest of some sort and stops there."""
    query = select(table).where((table.c.kind == kind) & (table.c.model == model))
    for row in stream(connection, query.order_by(table.c.number.desc())):
        yield _entry(connection, row)


def opened_after(connection: Connection, kind: str, entry: Entry) -> list[Entry]:
    """Records of ``kind`` and of the same model that were opened after ``entry``, oldest first.

    Only these can name it, so whoever looks for those that do reads no more of the history than this.
    """
    opened = (events.c.kind == f"{entry.kind}.opened") & (events.c.subject == entry.digest)
    began = connection.scalar(select(func.min(events.c.sequence)).where(opened)) or 0
    query = select(events.c.subject).where((events.c.kind == f"{kind}.opened") & (events.c.sequence > began))
    digests = dict.fromkeys(connection.scalars(query.order_by(events.c.sequence)))
    found = (record for digest in digests for record in entries(connection, kind, digest=digest))
    return [record for record in found if record.model == entry.model]


def _entry(connection: Connection, row: Row) -> Entry:
    record = KINDS[row.kind].from_document(read_document(connection, row.document))
    return Entry(row.kind, row.number, row.model, row.document, row.status, row.result, record)
