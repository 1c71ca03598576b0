"""``log verify``: recompute everything that the evidence promises and name what does not match.

In four phases, each a stream: the events (folded into a ``Projection``), the documents, the index tables, the packs.
Nothing is kept in memory but a count and the first problems.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, LargeBinary, Table, cast, func, select

from meristem.ecosystem.projection import Projection, named_by
from meristem.ecosystem.records import Asset, Content, references
from meristem.errors import BadInput, Tampered
from meristem.store import checkpoints, evidence, keys
from meristem.store.canonical import digest_bytes, parse
from meristem.store.checkpoints import Checkpoint, Mark
from meristem.store.database import stream
from meristem.store.index import locate, location_of
from meristem.store.keys import Keyring
from meristem.store.pack_format import is_pack_name
from meristem.store.packs import Location, Packs
from meristem.store.schema import blobs, documents, events
from meristem.store.store import Store

Progress = Callable[[str, int, int], None]
Report = Callable[[str, int | None], None]  # what is wrong, the first event that it may concern
KEPT = 1000  # problems in full; all are counted
_SHOWN_EVERY = 256
_AT_ONCE = 1000


@dataclass
class Audit:
    """What was checked, what is wrong (one line each), and the head to keep outside the workspace.

    Events up to ``anchored`` are vouched for by something outside the workspace, up to ``signed`` by a signature
    inside it, and the rest only by being chained to each other.
    """

    events: int = 0
    documents: int = 0
    blobs: int = 0
    head: str = evidence.GENESIS
    anchored: Mark | None = None
    signed: Mark | None = None
    first_bad: int | None = None
    first_problem: str | None = None  # with the event ``first_bad``
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        return not self.problem_count

    def report(self, problem: str, first: int | None = None) -> None:
        """``first``: the number of the first event that the problem may concern."""
        self.problem_count += 1
        if len(self.problems) < KEPT:
            self.problems.append(problem)
        if first is not None and (self.first_bad is None or first < self.first_bad):
            self.first_bad, self.first_problem = first, problem


def verify(
    store: Store,
    progress: Progress | None = None,
    expected_head: str | None = None,
    anchor: list[tuple[str, Checkpoint]] | None = None,
) -> Audit:
    """Check the chain, every signature, every document, every blob and every pointer of the workspace.

    ``expected_head`` is a hash and ``anchor`` a list of checkpoints (``Anchor.read``) kept elsewhere: both must
    stand in the chain, which catches a cut tail and a recomputed chain. Raises ``BadInput`` for a head that is none,
    ``EnvironmentFailure`` when the store cannot be read.
    """
    if expected_head is not None and not is_pack_name(expected_head):
        raise BadInput(
            f"--head {expected_head}: not a head; it looks like {evidence.GENESIS[:15]}... with 64 digits"
        )
    audit = Audit()
    for damage in store.database.damage():
        audit.report(damage)
    with tempfile.TemporaryDirectory(prefix="meristem-verify-") as folder:
        projection = Projection(Path(folder), audit.report)
        try:
            with store.database.read() as connection:
                ring = _check_events(connection, projection, audit, progress)
                _check_heads(connection, ring, audit, expected_head, anchor or [])
                _check_documents(connection, projection, audit, progress)
                _check_tables(connection, projection, audit)
                _place_blobs(connection, projection, audit)
            _check_packs(store, projection, audit, progress)
        finally:
            projection.close()
    return audit


# Events and who vouches for them


def _check_events(
    connection: Connection, projection: Projection, audit: Audit, progress: Progress | None
) -> Keyring:
    """Walk the chain; returns the keys that it let in."""
    ring = Keyring()
    audit.events = _count(connection, events)
    links = evidence.check_chain(connection)
    for link in _shown(links, "events", audit.events, progress):
        if link.problem:
            audit.report(f"event {link.sequence}: {link.problem}", link.first)
        if link.event is None:
            continue
        try:
            projection.fold(link.event)
            if link.event.kind in (keys.ADDED, keys.ROTATED):
                ring.admit(link.event)
        except Tampered as error:
            audit.report(f"event {link.sequence}: {error}", link.sequence)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = f"event {link.sequence}: its data do not say what happened ({error!r})"
            audit.report(problem, link.sequence)
    projection.check_moves()
    audit.head = evidence.head(connection)[1]
    return ring


def _check_heads(
    connection: Connection,
    ring: Keyring,
    audit: Audit,
    expected_head: str | None,
    anchor: list[tuple[str, Checkpoint]],
) -> None:
    audit.anchored, audit.signed = checkpoints.examine(connection, ring, anchor, audit.report)
    if expected_head is None:
        return
    sequence = checkpoints.position(connection, expected_head)
    if sequence is None:
        sure = max((mark.sequence for mark in (audit.anchored, audit.signed) if mark), default=0)
        audit.report(
            f"the chain does not contain the head {expected_head} kept outside: its tail was cut off, or it was "
            f"computed anew from event {sure + 1} on at the earliest",
            sure + 1,
        )
    elif audit.anchored is None or audit.anchored.sequence < sequence:
        audit.anchored = Mark(sequence)


# Documents


def _check_documents(
    connection: Connection, projection: Projection, audit: Audit, progress: Progress | None
) -> None:
    """Every document, and that every document and every blob is there that an event or a document names."""
    audit.documents = _count(connection, documents)
    body = cast(documents.c.body, LargeBinary).label("body")  # whatever type somebody gave it
    rows = stream(connection, select(documents.c.digest, documents.c.schema, body))
    reader = DocumentReader(projection)
    for digest, schema, raw in _shown(rows, "documents", audit.documents, progress):
        try:
            reader.read(digest, schema, raw)
        except (ValueError, TypeError, RecursionError, BadInput) as error:
            audit.report(f"document {digest} ({schema}): {error}")
    reader.read_bases(connection)
    there = stream(connection, select(documents.c.digest).order_by(documents.c.digest))
    for digest, source in projection.missing("documents", (row.digest for row in there)):
        first = source if isinstance(source, int) else None
        audit.report(f"document {digest}: named by {named_by(source)} but missing", first)


class DocumentReader:
    """Notes what documents name.

    What only retired versions and assets hold may be gone: their files, and the tensors of a content that belongs to
    retired versions alone, unless the content of a version in use sits on it.
    """

    def __init__(self, projection: Projection):
        self.projection = projection
        self.is_retired = projection.retired()
        self.is_only_retired = projection.only_retired()
        self.retired_contents: set[str] = set()
        self.bases: set[str] = set()

    def read(self, digest: str, schema: str, body: bytes) -> None:
        """Raises ``ValueError``, ``TypeError`` or ``BadInput`` for a document that is not what it should be."""
        if digest_bytes(body) != digest:
            raise ValueError("its bytes do not match its digest")
        document = parse(body)
        if not isinstance(document, dict) or document.get("schema") != schema:
            raise ValueError("its schema column does not match its bytes")
        below, blobs_below = references(document)
        for name in (*below, *blobs_below):
            if not isinstance(name, str):
                raise ValueError(f"it names {name!r} where a digest belongs")
        for name in below:
            self.projection.want("documents", name, digest)
        if schema == Content.SCHEMA:
            if self.is_only_retired(digest):
                self.retired_contents.add(digest)
                return
            self.bases |= below
        if schema == Asset.SCHEMA and self.is_retired(digest):
            return
        for name in blobs_below:
            self.projection.want("blobs", name, digest)

    def read_bases(self, connection: Connection) -> None:
        """Those retired contents that a content in use sits on."""
        while used := self.bases & self.retired_contents:
            self.retired_contents -= used
            for digest in used:
                body = connection.scalar(select(documents.c.body).where(documents.c.digest == digest))
                below, blobs_below = references(parse(body or b"{}"))
                self.bases |= below
                for name in blobs_below:
                    self.projection.want("blobs", name, digest)


# Tables


def _check_tables(connection: Connection, projection: Projection, audit: Audit) -> None:
    for what, key in projection.differences(connection):
        audit.report(f"{what} {key}: the table does not match the evidence")


# Blobs


def _place_blobs(connection: Connection, projection: Projection, audit: Audit) -> None:
    """Take note of the index of blobs; every blob that a document names must have a place in a pack."""
    batch: list[tuple[str, int, str, bytes]] = []
    for row in stream(connection, select(blobs)):
        try:
            location = location_of(row)
            if not (isinstance(row.pack, str) and is_pack_name(row.pack)):
                raise Tampered(f"blob {row.digest}: its row in the index is damaged")
        except Tampered as error:
            audit.report(str(error))
            continue
        batch.append((location.pack, location.offset, location.digest, _packed(location)))
        if len(batch) == _AT_ONCE:
            projection.place(batch)
            batch = []
    projection.place(batch)
    there = stream(connection, select(blobs.c.digest).order_by(blobs.c.digest))
    for digest, source in projection.missing("blobs", (row.digest for row in there)):
        audit.report(f"blob {digest}: named by {named_by(source)} but not stored")


def _check_packs(store: Store, projection: Projection, audit: Audit, progress: Progress | None) -> None:
    total = projection.count_places()

    def step() -> None:
        audit.blobs += 1
        if progress and (audit.blobs % 64 == 0 or audit.blobs == total):
            progress("blobs", audit.blobs, total)

    for pack, rows in groupby(projection.places(), key=lambda row: row[0]):
        indexed = [_unpacked(packed) for _, packed in rows]
        problems: list[str] = []
        check_pack(store.packs, pack, indexed, problems.append)
        if problems and (moved := _moved(store, pack, indexed)) is not None:
            problems = []
            for location in moved:
                _check_blob(store.packs, location, problems.append)
        for problem in problems:
            audit.report(problem)
        for _ in indexed:
            step()


def check_pack(packs: Packs, pack: str, indexed: list[Location], report: Callable[[str], None]) -> None:
    """One pack: its header, from which the index can be rebuilt; ``indexed``, what the index says of it; every byte.

    One that cannot be reached is no damage: that raises ``EnvironmentFailure``.
    """
    try:
        entries = list(packs.entries(pack))
    except Tampered as error:
        report(f"pack {pack}: {error}")
        return
    known = set(entries)
    for location in indexed:
        if location not in known:
            report(f"blob {location.digest}: the index does not say where pack {pack} holds it")
    done = 0
    try:
        for _ in packs.views(entries):
            done += 1
    except Tampered:
        for location in entries[done:]:  # one by one, to name every one
            _check_blob(packs, location, report)


def _check_blob(packs: Packs, location: Location, report: Callable[[str], None]) -> None:
    try:
        packs.check(location)
    except Tampered as error:
        report(str(error))


def _moved(store: Store, pack: str, indexed: list[Location]) -> list[Location] | None:
    """Where the blobs of a pack are that was repacked since the audit began; None when it was not."""
    with store.database.read() as connection:
        found = locate(connection, [location.digest for location in indexed])
    return None if any(location.pack == pack for location in found.values()) else list(found.values())


def _packed(location: Location) -> bytes:
    fields = (
        location.digest,
        location.pack,
        location.offset,
        location.length,
        location.dtype,
        location.shape,
    )
    return json.dumps(fields).encode()


def _unpacked(packed: bytes) -> Location:
    digest, pack, offset, length, dtype, shape = json.loads(packed)
    return Location(digest, pack, offset, length, dtype, tuple(shape))


def _count(connection: Connection, table: Table) -> int:
    return connection.scalar(select(func.count()).select_from(table)) or 0


def _shown(items: Iterable[Any], what: str, total: int, progress: Progress | None) -> Iterator[Any]:
    for done, item in enumerate(items, start=1):
        yield item
        if progress and done % _SHOWN_EVERY == 0 and done < total:
            progress(what, done, total)
    if progress and total:
        progress(what, total, total)
