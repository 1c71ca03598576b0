"""Immutable versions: making them, naming them, and finding them again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, Row, func, insert, select

from meristem.ecosystem import aliases, retirement
from meristem.ecosystem.records import Content, Version
from meristem.errors import BadInput, StateMoved
from meristem.store.canonical import PREFIX
from meristem.store.index import locate
from meristem.store.schema import models, retired, versions
from meristem.store.store import Transaction, read_document

_LOOKUP = 500  # SQLite binds a limited number of variables per statement


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
    _refuse_lost(tx.connection, record.content)
    if found:
        entry = _entry(tx.connection, found)
        retirement.restore(tx, "version", entry.digest)
        return entry
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


def of_model(connection: Connection, model: str, last: int | None = None) -> list[VersionEntry]:
    """The versions of a model, oldest first; with ``last``, only that many of the newest."""
    query = select(versions).where(versions.c.model == model).order_by(versions.c.number.desc()).limit(last)
    return [_entry(connection, row) for row in reversed(connection.execute(query).all())]


def count(connection: Connection, model: str) -> int:
    query = select(func.count()).select_from(versions).where(versions.c.model == model)
    return connection.scalar(query) or 0


def labels(connection: Connection, digests: Iterable[str]) -> dict[str, str]:
    """``name@v3`` for those ``digests`` that are versions; no document is read."""
    wanted, found = list(dict.fromkeys(digests)), {}
    for start in range(0, len(wanted), _LOOKUP):
        query = select(versions.c.digest, versions.c.model, versions.c.number)
        for row in connection.execute(query.where(versions.c.digest.in_(wanted[start : start + _LOOKUP]))):
            found[row.digest] = f"{row.model}@v{row.number}"
    return found


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


def refuse_given_up(connection: Connection, content: str) -> None:
    """Raises ``BadInput`` naming the event when bytes of ``content`` went with the last version that had it."""
    rows = connection.execute(select(versions).where(versions.c.content == content)).all()
    gone = [row for row in rows if retirement.event_of(connection, row.digest)]
    if gone and len(gone) == len(rows) and _lacks(connection, content):
        retirement.refuse(connection, gone[-1].digest)


def _lacks(connection: Connection, content: str) -> bool:
    found = content_of(connection, content)
    named = {*found.tensors.values(), *found.files.values()}
    return bool(named - locate(connection, named).keys())


def _refuse_lost(connection: Connection, content: str) -> None:
    """Raises ``StateMoved`` when bytes of ``content`` were given up with an older version, and nobody stored them again.

    Only such a content can lack bytes: those of a new one were stored for it.
    """
    digest: str | None = content
    while digest:
        same = select(versions.c.digest).join(retired, retired.c.digest == versions.c.digest)
        lost = connection.execute(same.where(versions.c.content == digest).limit(1)).first()
        if lost and _lacks(connection, digest):
            raise StateMoved("the bytes of this version were given up meanwhile; repeat the command")
        digest = content_of(connection, digest).base


def _newest(connection: Connection, model: str) -> int:
    return connection.scalar(select(func.max(versions.c.number)).where(versions.c.model == model)) or 0


def _entry(connection: Connection, row: Row) -> VersionEntry:
    record = Version.from_document(read_document(connection, row.digest))
    return VersionEntry(row.digest, row.model, row.number, row.content, record)
