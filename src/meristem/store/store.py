"""``Store``: packs, documents and evidence behind one transaction.

Whoever changes the workspace does it here::

    stored = store.put(blobs)                       # durable and leased before anything names them
    with store.transaction("kim", "why") as tx:     # evidence, documents and indexes: all or nothing
        tx.add_blobs(stored)
        digest = tx.add_document(document)
        tx.append("version.created", digest)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, insert, select

from meristem.errors import BadInput, EnvironmentFailure, StateMoved, Tampered
from meristem.store import evidence, index, leases
from meristem.store.canonical import canonical, digest_bytes, parse
from meristem.store.database import Database
from meristem.store.index import locate
from meristem.store.ownership import check_packs
from meristem.store.packs import Blob, Location, Packs, packs_at
from meristem.store.schema import documents
from meristem.store.sqlite import SQLite

Progress = Callable[[int, int], None]
T = TypeVar("T")
DATABASE_FILE = "meristem.db"
PACKS_FOLDER = "packs"


@dataclass(frozen=True)
class Stored:
    """What ``put`` made durable: the new ``locations``, and the lease on these and on all that was there before."""

    lease: str | None
    locations: tuple[Location, ...] = ()


class Store:
    """``root`` is this machine's folder; ``database`` and ``packs`` are URLs of what a team shares."""

    def __init__(self, root: Path, database: str | None = None, packs: str | None = None):
        self.root = Path(root)
        self.packs: Packs = packs_at(packs or self.root / PACKS_FOLDER)
        self.database = _database(database, self.root / DATABASE_FILE)
        self.lease_seconds = leases.SECONDS
        self._owned = False

    def put(self, blobs: Iterable[Blob], progress: Progress | None = None) -> Stored:
        """Write those blobs that the store does not hold yet as one pack, and lease all of them.

        The lease's id salts the pack, so that its name was never used before.
        The lease ends with the transaction that gets the result (``Transaction.add_blobs``). Not to be called inside
        a transaction, which would wait for itself. Raises ``EnvironmentFailure`` when the disk refuses.
        """
        unique: dict[str, Blob] = {}
        for blob in blobs:
            _refuse_disguise(blob, unique.setdefault(blob.digest, blob))
        if not unique:
            return Stored(None)
        if not self._owned:
            check_packs(self.database, self.packs, claim=True)
            self._owned = True
        lost = self._lost_packs(unique)
        with self.database.write() as connection:
            known = {d: place for d, place in locate(connection, unique).items() if place.pack not in lost}
            for digest, location in known.items():
                _refuse_disguise(unique[digest], location)
            new = [blob for digest, blob in unique.items() if digest not in known]
            lease = leases.new()
            names = [*unique, *([self.packs.name_of(new, lease)] if new else [])]
            leases.take(connection, names, self.database.now(connection) + self.lease_seconds, lease)
        try:
            with self.renewed(lease):
                return Stored(lease, tuple(self.packs.write(new, progress, lease)))
        except BaseException:
            with suppress(EnvironmentFailure, StateMoved), self.database.write() as connection:
                leases.end(connection, lease)
            raise

    def refuse_foreign_packs(self) -> None:
        """Raises ``BadInput`` unless the packs here are those of the database: look before any is taken away."""
        check_packs(self.database, self.packs, claim=False)

    def _lost_packs(self, digests: Collection[str]) -> set[str]:
        """Packs of known ``digests`` that are gone or cut short: what they held is written anew, not taken as there."""
        with self.database.read() as connection:
            ends: dict[str, int] = {}
            for place in locate(connection, digests).values():
                ends[place.pack] = max(ends.get(place.pack, 0), place.offset + place.length)
        return {pack for pack, end in ends.items() if not self._reaches(pack, end)}

    def _reaches(self, pack: str, end: int) -> bool:
        try:
            return self.packs.size(pack) >= end
        except Tampered:
            return False

    @contextmanager
    def renewed(self, lease: str) -> Iterator[None]:
        """Keep ``lease`` alive while bytes are written, which may take longer than a lease.

        From a thread, because an upload's last parts and the reading back report no progress. A process that is
        suspended renews nothing.
        """
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self.lease_seconds / 3):
                with suppress(EnvironmentFailure, StateMoved), self.database.write() as connection:
                    now = self.database.now(connection)
                    leases.renew(connection, lease, now, now + self.lease_seconds)

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def transaction(self, actor: str, reason: str = "") -> Iterator[Transaction]:
        with self.database.write() as connection:
            yield Transaction(connection, actor, reason, self.database)

    def read_blob(self, digest: str) -> bytes:
        """A blob's bytes, checked. Raises ``BadInput`` if unknown, ``Tampered`` if they do not match."""
        return self.placed([digest], lambda places: self.packs.read(places[digest]))

    def placed(self, digests: Collection[str], use: Callable[[dict[str, Location]], T]) -> T:
        """``use`` called with the places of ``digests``; once again if a repacking moved some of them meanwhile."""
        found = self.locations(digests)
        try:
            return use(found)
        except Tampered:
            moved = self.locations(digests)
            if moved == found:
                raise
            return use(moved)

    def check_places(self, places: dict[str, Location]) -> None:
        """Raises ``Tampered`` unless the bytes at all ``places`` are there and match their digests."""
        for place in places.values():
            self.packs.check(place)

    def views(self, digests: Iterable[str]) -> Iterator[tuple[Location, memoryview]]:
        """Checked bytes of blobs, in the order asked; see ``Packs.views``."""
        left = list(digests)
        while left:
            found, done = self.locations(set(left)), 0
            try:
                for location, view in self.packs.views([found[digest] for digest in left]):
                    yield location, view
                    done += 1
            except Tampered:
                if self.locations(set(left)) == found:  # not moved by a repacking
                    raise
            left = left[done:]

    def rebuild_index(self, progress: Progress | None = None) -> tuple[int, int]:
        """Make the index of blobs again from the packs alone; returns the numbers of packs and blobs."""
        self.refuse_foreign_packs()
        with self.database.write() as connection:
            return index.rebuild(connection, self.packs, progress)

    def location(self, digest: str) -> Location:
        return self.locations([digest])[digest]

    def locations(self, digests: Iterable[str]) -> dict[str, Location]:
        digests = list(digests)
        with self.database.read() as connection:
            found = locate(connection, digests)
        missing = [d for d in digests if d not in found]
        if missing:
            raise BadInput(f"the store holds no blob {missing[0]}")
        return found

    def document(self, digest: str) -> dict[str, Any]:
        with self.database.read() as connection:
            return read_document(connection, digest)


class Transaction:
    """What one atomic change of the workspace may do. ``connection`` reaches the index tables."""

    def __init__(self, connection: Connection, actor: str, reason: str, database: Database):
        self.connection, self.actor, self.reason, self._database = connection, actor, reason, database

    def add_blobs(self, stored: Stored) -> None:
        """Index what ``put`` stored, and end its lease: a document of this transaction names it from here on.

        Raises ``StateMoved`` when the lease has run out.
        """
        if stored.lease is None:
            return
        leases.check(self.connection, stored.lease, self._database.now(self.connection))
        index.move(self.connection, stored.locations)  # also those that had a place in a pack that was lost
        leases.end(self.connection, stored.lease)

    def add_document(self, document: dict[str, Any]) -> str:
        """Store a JSON document with a ``schema`` id; the same document twice is stored once."""
        body = _canonical(document)
        digest = digest_bytes(body)
        known = self.connection.scalar(select(documents.c.digest).where(documents.c.digest == digest))
        if known is None:
            self.connection.execute(
                insert(documents).values(digest=digest, schema=document["schema"], body=body)
            )
        return digest

    def append(self, kind: str, subject: str, /, *, reason: str | None = None, **data: Any) -> evidence.Event:
        reason = self.reason if reason is None else reason
        _canonical([self.actor, reason, data])
        return evidence.append(
            self.connection, kind=kind, subject=subject, actor=self.actor, reason=reason, data=data
        )


def _database(url: str | None, file: Path) -> Database:
    if url is None:
        return SQLite(file)
    from meristem.store.postgresql import PostgreSQL  # its driver is an extra

    return PostgreSQL(url)


def _canonical(document: Any) -> bytes:
    try:
        return canonical(document)
    except ValueError as error:
        raise BadInput(f"cannot be stored as JSON: {error}; mend the text or number and repeat") from error


def _refuse_disguise(blob: Blob, other: Blob | Location) -> None:
    """A file made to have the digest of a tensor would be taken for it: no honest file has one."""
    if (blob.dtype is None) != (other.dtype is None):
        raise BadInput(
            f"a file and a tensor share the digest {blob.digest}; do not trust where they came from"
        )


def read_document(connection: Connection, digest: str) -> dict[str, Any]:
    body = connection.scalar(select(documents.c.body).where(documents.c.digest == digest))
    if body is None:
        raise BadInput(f"the store holds no document {digest}")
    if digest_bytes(body) != digest:
        raise Tampered(f"document {digest} does not match its digest")
    found: dict[str, Any] = parse(body)
    return found
