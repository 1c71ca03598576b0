"""Immutable versions: making them, naming them, and finding them again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, Row, func, insert, select

from meristem.ecosystem import aliases
from meristem.ecosystem.records import Content, Version
from meristem.errors import BadInput
from meristem.store.canonical import PREFIX
from meristem.store.schema import models, versions
from meristem.store.store import Transaction, read_document


@dataclass(frozen=True)
class VersionEntry:
    """A version with its number in its model's line."""

    digest: str
    model: str
    number: int
    content: str
    record: Version

    @property
    def label(self) -> str:
        return f"{self.model}@v{self.number}"


def create(tx: Transaction, content: Content, record: Version) -> VersionEntry:
    """Add a version; the same version twice is the same version (nothing is written the second time)."""
    if tx.add_document(content.document()) != record.content:
        raise ValueError("the version names another content than the one given with it")
    digest = tx.add_document(record.document())
    found = tx.connection.execute(select(versions).where(versions.c.digest == digest)).first()
    if found:
        return _entry(tx.connection, found)
    number = _newest(tx.connection, record.model) + 1
    tx.connection.execute(
        insert(versions).values(digest=digest, model=record.model, number=number, content=record.content)
    )
    tx.append("version.created", digest, model=record.model, number=number, content=record.content)
    return VersionEntry(digest, record.model, number, record.content, record)


def resolve(connection: Connection, reference: str) -> VersionEntry:
    """The version behind ``name@v3``, ``name@sha256:...`` (12 digits or more), ``name@alias`` or ``name``.

    A bare name means its champion. Raises ``BadInput`` naming what exists.
    """
    name, _, selector = reference.partition("@")
    if connection.scalar(select(models.c.name).where(models.c.name == name)) is None:
        known = ", ".join(connection.scalars(select(models.c.name).order_by(models.c.name))) or "none yet"
        raise BadInput(f"unknown model '{name}'; models here: {known}")
    selector = selector or aliases.CHAMPION
    if re.fullmatch(r"v[0-9]{1,9}", selector):
        where = versions.c.number == int(selector[1:])
    elif selector.startswith(PREFIX):
        if len(selector) < len(PREFIX) + 12:
            raise BadInput(f"'{reference}': give at least 12 digits of the digest")
        where = versions.c.digest.startswith(selector, autoescape=True)
    else:
        alias = aliases.read(connection, name, selector)
        if alias is None:
            known = ", ".join(a.name for a in aliases.of_model(connection, name)) or "none"
            raise BadInput(f"model {name} has no alias '{selector}'; it has: {known}")
        where = versions.c.digest == alias.version
    rows = connection.execute(select(versions).where((versions.c.model == name) & where)).all()
    if len(rows) != 1:
        what = "several versions match" if rows else "no such version"
        raise BadInput(f"'{reference}': {what}; {name} has v1 to v{_newest(connection, name)}")
    return _entry(connection, rows[0])


def by_digest(connection: Connection, digest: str) -> VersionEntry:
    row = connection.execute(select(versions).where(versions.c.digest == digest)).first()
    if row is None:
        raise BadInput(f"there is no version {digest}")
    return _entry(connection, row)


def of_model(connection: Connection, model: str) -> list[VersionEntry]:
    query = select(versions).where(versions.c.model == model).order_by(versions.c.number)
    return [_entry(connection, row) for row in connection.execute(query)]


def content_of(connection: Connection, digest: str) -> Content:
    return Content.from_document(read_document(connection, digest))


def ancestors(connection: Connection, version: VersionEntry) -> Iterator[VersionEntry]:
    """The version itself, then its parents, then theirs; each once. A pinned base counts as a parent."""
    queue, seen = [version.digest], set()
    while queue:
        digest = queue.pop(0)
        if digest in seen:
            continue
        seen.add(digest)
        entry = by_digest(connection, digest)
        yield entry
        queue += entry.record.parents or ([entry.record.base] if entry.record.base else [])


def _newest(connection: Connection, model: str) -> int:
    return connection.scalar(select(func.max(versions.c.number)).where(versions.c.model == model)) or 0


def _entry(connection: Connection, row: Row) -> VersionEntry:
    record = Version.from_document(read_document(connection, row.digest))
    return VersionEntry(row.digest, row.model, row.number, row.content, record)
