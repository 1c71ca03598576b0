"""Whose packs are these? A place for packs belongs to one store.

To the garbage collection of another store every pack would be waste; and a machine that keeps its packs at another place
than its team would name bytes that nobody else can read. So the database has an id, the place of the packs says which id
it belongs to, and the database remembers that it has such a place.
"""

from __future__ import annotations

from sqlalchemy import insert, select

from meristem.errors import BadInput, EnvironmentFailure
from meristem.store.database import STORE, Database
from meristem.store.packs import Packs
from meristem.store.schema import settings

PACKS = "packs_claimed"


def check_packs(database: Database, packs: Packs, *, claim: bool) -> None:
    """Raises ``BadInput`` when ``packs`` are another store's, ``EnvironmentFailure`` when those of ``database`` are not here.

    With ``claim`` the first place that a store has is taken for it.
    """
    with database.read() as connection:
        known = {row.key: row.value for row in connection.execute(select(settings))}
    store, owner = known[STORE], packs.owner()
    if owner is None and PACKS in known:
        raise EnvironmentFailure(
            f"{packs.place}: this workspace keeps its packs at another place, or they are gone; mount the folder or "
            "mend `packs` in meristem.yaml (or restore the packs from a backup), then repeat the command"
        )
    if owner is None and not claim:
        return
    if owner is None:
        packs.claim(store)
        owner = packs.owner()
    if owner != store:
        raise BadInput(
            f"{packs.place}: these packs belong to another workspace; give this one a place of its own (`packs` in "
            "meristem.yaml)"
        )
    if claim and PACKS not in known:
        with database.write() as connection:
            if connection.scalar(select(settings.c.value).where(settings.c.key == PACKS)) is None:
                connection.execute(insert(settings).values(key=PACKS, value="yes"))
