"""``Store``: packs, documents and evidence behind one transaction.

Whoever changes the workspace does it here::

    locations = store.put(blobs)                    # durable before anything names them
    with store.transaction("kim", "why") as tx:     # evidence, documents and indexes: all or nothing
        tx.add_blobs(locations)
        digest = tx.add_document(document)
        tx.append("version.created", digest)
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select

from meristem.errors import BadInput, Tampered
from meristem.store import evidence
from meristem.store.canonical import canonical, digest_bytes, parse
from meristem.store.database import Database
from meristem.store.packs import Blob, Location, Packs
from meristem.store.schema import blobs as blob_table
from meristem.store.schema import documents

_LOOKUP = 500  # SQLite binds a limited number of variables per statement


class Store:
    def __init__(self, root: Path):
        self.root = Path(root)
        self.packs = Packs(self.root / "packs")
        self.database = Database(self.root / "meristem.db")

    def put(
        self, blobs: Iterable[Blob], progress: Callable[[int, int], None] | None = None
    ) -> list[Location]:
        """Write those blobs that the store does not hold yet as one pack; returns the new locations."""
        unique = {blob.digest: blob for blob in blobs}
        with self.database.read() as connection:
            known = locate(connection, unique)
        return self.packs.write((b for d, b in unique.items() if d not in known), progress)

    @contextmanager
    def transaction(self, actor: str, reason: str = "") -> Iterator[Transaction]:
        with self.database.write() as connection:
            yield Transaction(connection, actor, reason)

    def read_blob(self, digest: str) -> bytes:
        """A blob's bytes, checked. Raises ``BadInput`` if unknown, ``Tampered`` if they do not match."""
        return self.packs.read(self.location(digest))

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

    @contextmanager
    def mapped(self, pack: str) -> Iterator[memoryview]:
        """A pack's bytes as a read-only memory map."""
        path = self.packs.path(pack)
        if not path.exists():
            raise Tampered(f"{path}: the pack is missing")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                yield view
            finally:
                view.release()

    def document(self, digest: str) -> dict[str, Any]:
        with self.database.read() as connection:
            return read_document(connection, digest)


class Transaction:
    """What one atomic change of the workspace may do. ``connection`` reaches the index tables."""

    def __init__(self, connection: Connection, actor: str, reason: str):
        self.connection, self.actor, self.reason = connection, actor, reason

    def add_blobs(self, locations: Iterable[Location]) -> None:
        locations = list(locations)
        known = locate(self.connection, [location.digest for location in locations])
        rows = [
            {
                "digest": location.digest,
                "pack": location.pack,
                "offset": location.offset,
                "length": location.length,
                "dtype": location.dtype,
                "shape": json.dumps(location.shape),
            }
            for location in locations
            if location.digest not in known
        ]
        if rows:
            self.connection.execute(insert(blob_table), rows)

    def add_document(self, document: dict[str, Any]) -> str:
        """Store a JSON document with a ``schema`` id; the same document twice is stored once."""
        body = canonical(document)
        digest = digest_bytes(body)
        known = self.connection.scalar(select(documents.c.digest).where(documents.c.digest == digest))
        if known is None:
            self.connection.execute(
                insert(documents).values(digest=digest, schema=document["schema"], body=body)
            )
        return digest

    def append(self, kind: str, subject: str, /, *, reason: str | None = None, **data: Any) -> evidence.Event:
        return evidence.append(
            self.connection,
            kind=kind,
            subject=subject,
            actor=self.actor,
            reason=self.reason if reason is None else reason,
            data=data,
        )


def read_document(connection: Connection, digest: str) -> dict[str, Any]:
    body = connection.scalar(select(documents.c.body).where(documents.c.digest == digest))
    if body is None:
        raise BadInput(f"the store holds no document {digest}")
    if digest_bytes(body) != digest:
        raise Tampered(f"document {digest} does not match its digest")
    found: dict[str, Any] = parse(body)
    return found


def locate(connection: Connection, digests: Iterable[str]) -> dict[str, Location]:
    """The locations of those digests that the store holds."""
    digests = list(digests)
    found = {}
    for start in range(0, len(digests), _LOOKUP):
        query = select(blob_table).where(blob_table.c.digest.in_(digests[start : start + _LOOKUP]))
        for row in connection.execute(query):
            shape = tuple(json.loads(row.shape))
            found[row.digest] = Location(row.digest, row.pack, row.offset, row.length, row.dtype, shape)
    return found
