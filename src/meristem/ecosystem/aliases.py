"""Aliases: named pointers of a model, moved by compare-and-swap, with full history."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from meristem.errors import BadInput, StateMoved
from meristem.store.schema import alias_moves, aliases, versions
from meristem.store.store import Transaction

CHAMPION = "champion"
CHALLENGER = "challenger"

_NAME = re.compile(r"(?!v[0-9]+$)[a-z][a-z0-9_-]{0,63}")  # `name@v3` is a number, never an alias


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

    Raises ``StateMoved`` with what happened when somebody else moved it first, ``BadInput`` when ``to`` is no
    version of the model.
    """
    _check(tx.connection, model, name, to)
    found = read(tx.connection, model, name)
    revision = found.revision if found else 0
    if revision != expected_revision:
        raise _moved(tx.connection, model, name, expected_revision)
    if found is None:
        tx.connection.execute(insert(aliases).values(model=model, alias=name, version=to, revision=1))
    else:
        where = (aliases.c.model == model) & (aliases.c.alias == name) & (aliases.c.revision == revision)
        changed = tx.connection.execute(
            update(aliases).where(where).values(version=to, revision=revision + 1)
        )
        if changed.rowcount != 1:
            raise _moved(tx.connection, model, name, expected_revision)
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


def _check(connection: Connection, model: str, name: str, to: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadInput(f"alias '{name}': use lower-case letters, digits, '_' and '-', and not v1, v2, ...")
    if connection.scalar(select(versions.c.model).where(versions.c.digest == to)) != model:
        raise BadInput(f"{to} is not a version of model {model}; an alias points only at its own model's")


def _moved(connection: Connection, model: str, name: str, expected_revision: int) -> StateMoved:
    old, found = _at(connection, model, name, expected_revision), read(connection, model, name)
    new = _label(connection, found.version if found else None)
    moved = f"moved from {old} to {new}" if old != new else f"moved away from {old} and back"
    return StateMoved(f"the {name} {moved}; compare with it and decide again")


def _at(connection: Connection, model: str, name: str, revision: int) -> str:
    moves = [m for m in history(connection, model, name) if m.revision == revision]
    return _label(connection, moves[0].version if moves else None)


def _label(connection: Connection, digest: str | None) -> str:
    if digest is None:
        return "nothing"
    number = connection.scalar(select(versions.c.number).where(versions.c.digest == digest))
    return f"v{number}"
