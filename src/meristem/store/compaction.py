"""Giving back the space of packs: those that nothing needs go, those that are mostly dead are written anew.

Safe beside writers: bytes are copied without any lock, but a pack is removed only under the write lock and only when
no row of the index and no lease names it at that moment. Cut off anywhere, the next run finishes.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy import Connection, select

from meristem.errors import EnvironmentFailure, StateMoved, Tampered
from meristem.store import index, leases
from meristem.store.database import stream
from meristem.store.packs import Blob, Location
from meristem.store.schema import blobs, lease_names
from meristem.store.schema import leases as lease_table
from meristem.store.store import Store

THIN = 0.5  # a pack of which less than this share is needed is written anew


@dataclass
class Waste:
    """Packs with the bytes that each would give back, and what stands in the way (one line each)."""

    unused: dict[str, int] = field(default_factory=dict)
    thin: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def survey(store: Store, connection: Connection, dead: set[str]) -> Waste:
    """What could be given back if the blobs ``dead`` were not needed. A pack under a lease is left out."""
    held = leases.held(connection, store.database.now(connection))
    live: dict[str, int] = defaultdict(int)
    for row in stream(connection, select(blobs.c.digest, blobs.c.pack, blobs.c.length)):
        if row.digest not in dead:
            live[row.pack] += row.length
    found = Waste()
    for pack in store.packs.names():
        if pack in held:
            continue
        try:
            if pack not in live:
                found.unused[pack] = store.packs.size(pack)
            elif live[pack] < THIN * store.packs.size(pack):
                # Of a small pack the header is most: what counts is how much of its content is needed.
                whole = sum(location.length for location in store.packs.entries(pack))
                if live[pack] < THIN * whole:
                    found.thin[pack] = whole - live[pack]
        except Tampered as error:
            found.problems.append(f"{error}; left as it is, `meristem log verify` says more")
    return found


def remove_unused(store: Store, pack: str) -> int | None:
    """Take ``pack`` away unless something needs it; returns the bytes freed, None when it had to stay."""
    with store.database.write() as connection:  # nobody can index or lease it meanwhile
        if connection.execute(select(blobs.c.digest).where(blobs.c.pack == pack).limit(1)).first():
            return None
        if _leased(store, connection, pack):
            return None
        try:
            size = store.packs.size(pack)
        except Tampered:  # somebody else was first
            size = 0
        store.packs.remove(pack)
    return size


def repack(store: Store, pack: str) -> int:
    """Write what the index still finds in ``pack`` as a pack of its own, and remove the old one.

    Returns the bytes freed: none when there was nothing to leave out. Every byte is checked on its way. Raises
    ``Tampered`` when the pack is damaged; then nothing has changed.
    """
    places = _places(store, pack)
    if not places:
        return remove_unused(store, pack) or 0
    try:
        kept = [
            Blob(place.digest, view, place.dtype, place.shape) for place, view in store.packs.views(places)
        ]
    except Tampered:
        if not _places(store, pack):  # somebody else was first
            return 0
        raise
    name = store.packs.name_of(kept)
    if name == pack:
        return 0
    _copy(store, pack, name, kept)
    freed = remove_unused(store, pack)
    return 0 if freed is None else freed - store.packs.size(name)


def _copy(store: Store, pack: str, name: str, kept: list[Blob]) -> None:
    with store.database.write() as connection:
        digests = [blob.digest for blob in kept]
        lease = leases.take(connection, [name, *digests], _expiry(store, connection))
    try:
        with store.renewed(lease):
            written = store.packs.write(kept)
        with store.database.write() as connection:
            leases.check(connection, lease, store.database.now(connection))
            still = set(connection.scalars(select(blobs.c.digest).where(blobs.c.pack == pack)))
            index.move(connection, [place for place in written if place.digest in still])
            leases.end(connection, lease)
    except BaseException:
        with suppress(EnvironmentFailure, StateMoved), store.database.write() as connection:
            leases.end(connection, lease)
        raise


def _expiry(store: Store, connection: Connection) -> float:
    return store.database.now(connection) + store.lease_seconds


def _places(store: Store, pack: str) -> list[Location]:
    query = select(blobs).where(blobs.c.pack == pack).order_by(blobs.c.offset)
    with store.database.read() as connection:
        return [index.location_of(row) for row in connection.execute(query)]


def _leased(store: Store, connection: Connection, name: str) -> bool:
    query = (
        select(lease_names.c.name)
        .join(lease_table, lease_table.c.id == lease_names.c.lease)
        .where((lease_names.c.name == name) & (lease_table.c.expires > store.database.now(connection)))
    )
    return connection.execute(query.limit(1)).first() is not None
