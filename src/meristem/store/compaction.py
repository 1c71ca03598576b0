"""Giving back the space of packs: those that nothing needs go, those that are mostly dead are written anew.

Safe beside writers: bytes are copied under a lease and without any lock, but a pack is removed only under the write lock
and only when no row of the index and no lease names it at that moment, and nothing in it is named by a document and
unknown to the index. Cut off anywhere, the next run finishes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
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
AT_ONCE = 256 << 20  # bytes of one new pack: a remote store's blobs are in memory while they are copied

# Those of some digests that documents name. Asked before bytes go that the index does not find: it may be damaged.
Named = Callable[[Connection, set[str]], set[str]]


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
            if pack in store.packs.names():  # else another collection was faster
                found.problems.append(f"{error}; left as it is, `meristem log verify` says more")
    return found


def remove_unused(store: Store, pack: str, named: Named) -> int | None:
    """Take ``pack`` away unless something needs it; returns the bytes freed, None when it had to stay.

    Raises ``Tampered`` when it holds what a document names and no row of the index finds.
    """
    with store.database.write() as connection:  # nobody can index or lease it meanwhile
        if connection.execute(select(blobs.c.digest).where(blobs.c.pack == pack).limit(1)).first():
            return None
        if _leased(store, connection, pack):
            return None
        try:
            size = store.packs.size(pack)
        except Tampered:  # somebody else was first
            size = 0
        else:
            _refuse_lost(store, connection, pack, named)
        store.packs.remove(pack)
    return size


def repack(store: Store, pack: str, named: Named) -> int | None:
    """Write what the index still finds in ``pack`` as packs of their own, and remove the old one.

    Returns the bytes freed; None when the pack had to stay, since all of it is needed or somebody leases it. Every
    byte is checked on its way, and no more than ``AT_ONCE`` of them (or one blob) are in memory. Raises ``Tampered``
    when the pack is damaged, or as ``remove_unused`` does; then nothing is lost.
    """
    written = 0
    try:
        with store.database.read() as connection:
            places = _places(connection, pack)
        if places and {x.digest for x in places}.issuperset(x.digest for x in store.packs.entries(pack)):
            return None
        while claim := _claim(store, pack):
            written += _copy(store, pack, claim)
    except Tampered:
        with store.database.read() as connection:
            if _places(connection, pack):
                raise
        # Else somebody else was first, and the pack is gone.
    freed = remove_unused(store, pack, named)
    return None if freed is None else freed - written


@dataclass(frozen=True)
class _Claim:
    """Part of what the index finds in a pack, under a lease together with the pack ``name`` that it becomes."""

    lease: str
    name: str
    places: list[Location]


def _claim(store: Store, pack: str) -> _Claim | None:
    """What is to be copied next; None when the index finds nothing in ``pack`` any more.

    Read and leased in one transaction: from here on nobody may take it for dead, and who deletes it is told to wait.
    """
    with store.database.write() as connection:
        group = _first(_places(connection, pack))
        if not group:
            return None
        lease = leases.new()
        name = store.packs.name_of(group, lease)
        leases.take(connection, [name, *(x.digest for x in group)], _expiry(store, connection), lease)
    return _Claim(lease, name, group)


def _first(places: list[Location]) -> list[Location]:
    """As many of ``places`` as fit into memory together, at least one."""
    size = 0
    for count, place in enumerate(places):
        size += place.length
        if count and size > AT_ONCE:
            return places[:count]
    return places


def _copy(store: Store, pack: str, claim: _Claim) -> int:
    """Write the new pack and let the index find everything there; returns its size.

    If some of it is no longer to be found in ``pack`` (its lease had run out, or somebody else was faster), the new
    pack goes again, with all that must not stay in it; returns 0.
    """
    try:
        with store.renewed(claim.lease):
            kept = [Blob(x.digest, view, x.dtype, x.shape) for x, view in store.packs.views(claim.places)]
            written = store.packs.write(kept, None, claim.lease)
        with store.database.write() as connection:
            leases.check(connection, claim.lease, store.database.now(connection))
            leases.end(connection, claim.lease)
            still = {place.digest for place in _places(connection, pack)}
            whole = all(place.digest in still for place in written)
            if whole:
                index.move(connection, written)
    except BaseException:
        with suppress(EnvironmentFailure, StateMoved):
            with store.database.write() as connection:
                leases.end(connection, claim.lease)
            remove_unused(store, claim.name, _nothing)
        raise
    if not whole:
        remove_unused(store, claim.name, _nothing)
        return 0
    return store.packs.size(claim.name)


def abandoned(store: Store, leftovers: Iterable[str]) -> list[str]:
    """Those of ``Packs.leftovers`` whose writer holds no lease any more, so that it cannot win.

    ``leftovers`` must have been listed before: a writer has its lease first.
    """
    leftovers = list(leftovers)
    with store.database.read() as connection:
        held = leases.held(connection, store.database.now(connection))
    return [name for name in leftovers if not any(store.packs.becomes(name, pack) for pack in held)]


def _nothing(_connection: Connection, _digests: set[str]) -> set[str]:
    """Of a pack that was copied from another one nothing is lost with it."""
    return set()


def _refuse_lost(store: Store, connection: Connection, pack: str, named: Named) -> None:
    try:
        held = {location.digest for location in store.packs.entries(pack)}
    except Tampered:  # its header is damaged: nobody can find anything in it
        return
    unfound = held - index.locate(connection, held).keys()
    if lost := named(connection, unfound):
        raise Tampered(
            f"pack {pack[7:19]}... holds {min(lost)}, which a document names and the index does not; "
            "run `meristem store reindex`"
        )


def _expiry(store: Store, connection: Connection) -> float:
    return store.database.now(connection) + store.lease_seconds


def _places(connection: Connection, pack: str) -> list[Location]:
    """What the index finds in ``pack``."""
    query = select(blobs).where(blobs.c.pack == pack).order_by(blobs.c.offset)
    return [index.location_of(row) for row in connection.execute(query)]


def _leased(store: Store, connection: Connection, name: str) -> bool:
    query = (
        select(lease_names.c.name)
        .join(lease_table, lease_table.c.id == lease_names.c.lease)
        .where((lease_names.c.name == name) & (lease_table.c.expires > store.database.now(connection)))
    )
    return connection.execute(query.limit(1)).first() is not None
