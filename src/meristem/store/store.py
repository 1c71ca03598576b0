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
from meristem.store.packs import Blob, Location, Packs, disk_failure
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
        unique: dict[str, Blob] = {}
        for blob in blobs:
            _refuse_disguise(blob, unique.setdefault(blob.digest, blob))
        with self.database.read() as connection:
            known = locate(connection, unique)
        for digest, location in known.items():
            _refuse_disguise(unique[digest], location)
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
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise Tampered(f"{path}: the pack is missing or empty") from error
        except OSError as error:
            raise disk_failure(error, path) from error
        # Not closed here: an exception on its way out may still hold a slice. The last one closes the map.
        yield memoryview(mapped)

    def document(self, digest: str) -> dict[str, Any]:
        with self.database.read() as connection:
            return read_document(connection, digest)


class Transaction:
    """What one atomic change of the workspace may do. ``connection`` reaches the index tables."""

    def __init__(self, connection: Connection, actor: str, reason: str):
        self.connection, self.actor, self.reason = connection, actor, reason

    def add_blobs(self, locations: Iterable[Location]) -> None:
        unique = {location.digest: location for location in locations}
        known = locate(self.connection, unique)
        rows = [
            {
                "digest": location.digest,
                "pack": location.pack,
                "offset": location.offset,
                "length": location.length,
                "dtype": location.dtype,
                "shape": json.dumps(location.shape),
            }
            for location in unique.values()
            if location.digest not in known
        ]
        if rows:
            self.connection.execute(insert(blob_table), rows)

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


def locate(connection: Connection, digests: Iterable[str]) -> dict[str, Location]:
    """The locations of those digests that the store holds."""
    digests = list(digests)
    found = {}
    for start in range(0, len(digests), _LOOKUP):
        query = select(blob_table).where(blob_table.c.digest.in_(digests[start : start + _LOOKUP]))
        for row in connection.execute(query):
            found[row.digest] = location_of(row)
    return found


def location_of(row: Any) -> Location:
    """A row of the index. Raises ``Tampered`` when it cannot be a place in a pack."""
    try:
        shape = tuple(json.loads(row.shape))
    except (TypeError, ValueError) as error:
        raise Tampered(f"blob {row.digest}: its row in the index is damaged") from error
    if not all(type(number) is int and number >= 0 for number in (row.offset, row.length, *shape)):
        raise Tampered(f"blob {row.digest}: its row in the index is damaged")
    return Location(row.digest, row.pack, row.offset, row.length, row.dtype, shape)
