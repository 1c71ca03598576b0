"""Capability assets: data sets, suites, recipes and method state, versioned and content-addressed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, func, insert, select

from meristem.ecosystem import retirement
from meristem.ecosystem.records import Asset
from meristem.errors import BadInput
from meristem.store.canonical import PREFIX
from meristem.store.schema import assets as table
from meristem.store.store import Transaction, read_document


@dataclass(frozen=True)
class AssetEntry:
    digest: str
    kind: str
    name: str
    number: int
    record: Asset

    @property
    def label(self) -> str:
        return f"{self.name}@v{self.number}"


def add(tx: Transaction, record: Asset) -> AssetEntry:
    """Add an asset as the next version of ``(kind, name)``; the same content again is the same asset.

    Raises ``BadInput`` for one that was deleted on a request, or that has a file of one.
    """
    refuse_deleted(tx.connection, record)
    entry = register(tx, record)
    retirement.restore(tx, "asset", entry.digest)
    return entry


def refuse_deleted(connection: Connection, record: Asset) -> None:
    """Raises ``BadInput`` if ``record`` was deleted for good, or something with one of its files, under any name.

    To be asked before its bytes are stored again. What is here and was not given up stays as it is.
    """
    here = connection.scalar(select(table.c.digest).where(table.c.digest == record.digest))
    if here and not retirement.event_of(connection, record.digest):
        return
    files = set(record.files.values())
    for digest in sorted(retirement.all_deleted(connection)):
        deleted = Asset.from_document(read_document(connection, digest))
        if digest == record.digest or files & set(deleted.files.values()):
            retirement.refuse(connection, digest)


def register(tx: Transaction, record: Asset) -> AssetEntry:
    """As ``add``, of an asset whose bytes may be given up."""
    digest = tx.add_document(record.document())
    found = tx.connection.execute(select(table).where(table.c.digest == digest)).first()
    if found:
        return AssetEntry(digest, found.kind, found.name, found.number, record)
    where = (table.c.kind == record.kind) & (table.c.name == record.name)
    number = (tx.connection.scalar(select(func.max(table.c.number)).where(where)) or 0) + 1
    tx.connection.execute(
        insert(table).values(digest=digest, kind=record.kind, name=record.name, number=number)
    )
    tx.append("asset.added", digest, kind=record.kind, name=record.name, number=number)
    return AssetEntry(digest, record.kind, record.name, number, record)


def resolve(connection: Connection, kind: str, reference: str) -> AssetEntry:
    """``name`` (the newest), ``name@v2`` or a full digest. Raises ``BadInput`` naming what exists."""
    name, _, selector = reference.partition("@")
    by_digest = reference.startswith(PREFIX)
    if selector and not by_digest and not re.fullmatch(r"v[0-9]{1,9}", selector):
        raise BadInput(f"'{reference}': write {name}@v1")
    where = table.c.digest == reference if by_digest else table.c.name == name
    query = select(table).where((table.c.kind == kind) & where).order_by(table.c.number.desc())
    rows = connection.execute(query).all()
    if not rows:
        names = connection.scalars(
            select(table.c.name).where(table.c.kind == kind).distinct().order_by(table.c.name)
        )
        known = ", ".join(names) or "none yet"
        raise BadInput(f"unknown {kind} '{reference}'; here: {known}")
    wanted = [row for row in rows if not selector or row.number == int(selector[1:])]
    if not wanted:
        raise BadInput(f"{kind} '{name}' has no {selector}; the newest is v{rows[0].number}")
    row = wanted[0]
    return _entry(connection, row.digest, row.kind, row.name, row.number)


def listed(connection: Connection, kinds: Iterable[str]) -> list[AssetEntry]:
    query = (
        select(table)
        .where(table.c.kind.in_(list(kinds)))
        .order_by(table.c.kind, table.c.name, table.c.number)
    )
    return [
        _entry(connection, row.digest, row.kind, row.name, row.number) for row in connection.execute(query)
    ]


def _entry(connection: Connection, digest: str, kind: str, name: str, number: int) -> AssetEntry:
    return AssetEntry(digest, kind, name, number, Asset.from_document(read_document(connection, digest)))
