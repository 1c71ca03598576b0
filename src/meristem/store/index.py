"""The index of blobs: which pack holds a digest, and where. The packs alone are enough to make it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from meristem.errors import EnvironmentFailure, Tampered
from meristem.store.packs import Location, Packs
from meristem.store.schema import blobs

_LOOKUP = 500  # SQLite binds a limited number of variables per statement


def locate(connection: Connection, digests: Iterable[str]) -> dict[str, Location]:
    """The locations of those digests that the store holds."""
    digests = list(digests)
    found = {}
    for start in range(0, len(digests), _LOOKUP):
        query = select(blobs).where(blobs.c.digest.in_(digests[start : start + _LOOKUP]))
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


def add(connection: Connection, locations: Iterable[Location]) -> None:
    """Index ``locations``; a digest that has a place keeps it."""
    unique = {location.digest: location for location in locations}
    known = locate(connection, unique)
    if rows := [_row(location) for digest, location in unique.items() if digest not in known]:
        connection.execute(insert(blobs), rows)


def move(connection: Connection, locations: Iterable[Location]) -> None:
    """Give every digest of ``locations`` its new place."""
    unique = {location.digest: location for location in locations}
    forget(connection, unique)
    if unique:
        connection.execute(insert(blobs), [_row(location) for location in unique.values()])


def forget(connection: Connection, digests: Iterable[str]) -> None:
    digests = list(digests)
    for start in range(0, len(digests), _LOOKUP):
        connection.execute(delete(blobs).where(blobs.c.digest.in_(digests[start : start + _LOOKUP])))


def rebuild(
    connection: Connection, packs: Packs, progress: Callable[[int, int], None] | None = None
) -> tuple[int, int]:
    """Make the index again from the headers of all packs; returns how many packs and blobs there are.

    Where two packs hold a digest the place in the first is taken. Raises ``Tampered`` for a pack whose header is not
    the one that names it, and ``EnvironmentFailure`` when no pack is found where the index knows some: more likely they
    are elsewhere than gone. Then nothing is changed.
    """
    names = sorted(packs.names())
    known = connection.scalar(select(func.count()).select_from(blobs)) or 0
    if known and not names:
        raise EnvironmentFailure(
            f"no pack is found, and the index knows {known} blobs; mount the folder or mend `packs` in meristem.yaml "
            "(or restore the packs from a backup), then repeat the command"
        )
    connection.execute(delete(blobs))
    for done, pack in enumerate(names, start=1):
        add(connection, packs.entries(pack))
        if progress:
            progress(done, len(names))
    return len(names), connection.scalar(select(func.count()).select_from(blobs)) or 0


def _row(location: Location) -> dict[str, Any]:
    return {
        "digest": location.digest,
        "pack": location.pack,
        "offset": location.offset,
        "length": location.length,
        "dtype": location.dtype,
        "shape": json.dumps(location.shape),
    }
