"""Aliases: named pointers of a model, moved by compare-and-swap, with full history."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from meristem.errors import BadInput, StateMoved
from meristem.store.schema import alias_moves, aliases, versions
from meristem.store.store import Transaction

CHAMPION = "champion"
CHALLENGER = "challenger"


@dataclass(frozen=True)
class Alias:
    model: str
    name: str
    version: str
    revision: int


@dataclass(frozen=True)
class Move:
    revision: int
    version: str
    previous: str | None
    event: int


def read(connection: Connection, model: str, name: str) -> Alias | None:
    query = select(aliases).where((aliases.c.model == model) & (aliases.c.alias == name))
    row = connection.execute(query).first()
    return Alias(row.model, row.alias, row.version, row.revision) if row else None


def of_model(connection: Connection, model: str) -> list[Alias]:
    query = select(aliases).where(aliases.c.model == model).order_by(aliases.c.alias)
    return [Alias(row.model, row.alias, row.version, row.revision) for row in connection.execute(query)]


def champion(connection: Connection, model: str) -> Alias:
    found = read(connection, model, CHAMPION)
    if found is None:
        raise BadInput(f"model {model} has no champion; release a version first")
    return found


def move(tx: Transaction, model: str, name: str, to: str, expected_revision: int) -> Alias:
    """Point ``model@name`` at version ``to`` if its revision still is ``expected_revision`` (0: a new alias).

    Raises ``StateMoved`` with what happened when somebody else moved it first.
    """
    found = read(tx.connection, model, name)
    revision = found.revision if found else 0
    if revision != expected_revision:
        raise StateMoved(
            f"the {name} moved from {_at(tx.connection, model, name, expected_revision)} to "
            f"{_label(tx.connection, found.version if found else None)}; compare with it and decide again"
        )
    if found is None:
        tx.connection.execute(insert(aliases).values(model=model, alias=name, version=to, revision=1))
    else:
        where = (aliases.c.model == model) & (aliases.c.alias == name) & (aliases.c.revision == revision)
        tx.connection.execute(update(aliases).where(where).values(version=to, revision=revision + 1))
    previous = found.version if found else None
    event = tx.append("alias.moved", to, model=model, alias=name, revision=revision + 1, previous=previous)
    tx.connection.execute(
        insert(alias_moves).values(
            model=model,
            alias=name,
            revision=revision + 1,
            version=to,
            previous=previous,
            event=event.sequence,
        )
    )
    return Alias(model, name, to, revision + 1)


def history(connection: Connection, model: str, name: str) -> list[Move]:
    where = (alias_moves.c.model == model) & (alias_moves.c.alias == name)
    query = select(alias_moves).where(where).order_by(alias_moves.c.revision)
    return [Move(row.revision, row.version, row.previous, row.event) for row in connection.execute(query)]


def _at(connection: Connection, model: str, name: str, revision: int) -> str:
    moves = [m for m in history(connection, model, name) if m.revision == revision]
    return _label(connection, moves[0].version if moves else None)


def _label(connection: Connection, digest: str | None) -> str:
    if digest is None:
        return "nothing"
    number = connection.scalar(select(versions.c.number).where(versions.c.digest == digest))
    return f"v{number}"
