"""Leases: a writer's claim on what no document names yet.

Between storing bytes and the transaction that names them, garbage collection would take them for waste. So a writer
first leases, in one write transaction, every digest it is about to store or to reuse and the pack it is about to write;
the transaction that names them ends the lease. Who comes back after the lease has run out may find the bytes gone:
such a commit is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from sqlalchemy import Connection, delete, insert, select, update

from meristem.errors import StateMoved
from meristem.store.schema import lease_names, leases

SECONDS = 900.0


def new() -> str:
    """An id that no lease has or ever had: the salt of the packs written under it."""
    return secrets.token_hex(16)


def take(connection: Connection, names: Iterable[str], expires: float, lease: str | None = None) -> str:
    """Lease ``names`` (digests of blobs and packs) until ``expires``; returns the lease's id, ``new`` or given."""
    lease = lease or new()
    connection.execute(insert(leases).values(id=lease, expires=expires))
    rows = [{"lease": lease, "name": name} for name in dict.fromkeys(names)]
    if rows:
        connection.execute(insert(lease_names), rows)
    return lease


def renew(connection: Connection, lease: str, now: float, expires: float) -> None:
    """Hold ``lease`` for longer. Raises ``StateMoved`` when it has run out."""
    check(connection, lease, now)
    connection.execute(update(leases).where(leases.c.id == lease).values(expires=expires))


def check(connection: Connection, lease: str, now: float) -> None:
    """Raises ``StateMoved`` unless ``lease`` still holds at ``now``."""
    expires = connection.scalar(select(leases.c.expires).where(leases.c.id == lease))
    if expires is None or expires <= now:
        raise StateMoved(
            "this writer was held up for longer than its lease, and what it stored may be gone; repeat the command"
        )


def end(connection: Connection, lease: str) -> None:
    connection.execute(delete(lease_names).where(lease_names.c.lease == lease))
    connection.execute(delete(leases).where(leases.c.id == lease))


def drop_expired(connection: Connection, now: float) -> int:
    """Forget the leases that have run out; returns how many there were."""
    expired = list(connection.scalars(select(leases.c.id).where(leases.c.expires <= now)))
    for lease in expired:
        end(connection, lease)
    return len(expired)


def any_expired(connection: Connection, now: float) -> bool:
    return connection.execute(select(leases.c.id).where(leases.c.expires <= now).limit(1)).first() is not None


def held(connection: Connection, now: float) -> set[str]:
    """Every name under a lease that still holds."""
    query = (
        select(lease_names.c.name)
        .join(leases, leases.c.id == lease_names.c.lease)
        .where(leases.c.expires > now)
    )
    return set(connection.scalars(query))
