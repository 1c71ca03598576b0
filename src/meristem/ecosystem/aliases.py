"""Aliases: named pointers of a model, moved by compare-and-swap, with full history.

A protected alias is moved by the actors it names and by nobody else, not even through a decision that passed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqlalchemy import Connection, Row, delete, insert, select, update

from meristem.ecosystem import retirement
from meristem.errors import BadInput, StateMoved
from meristem.store.evidence import Event
from meristem.store.schema import alias_actors, alias_moves, aliases, events, models, versions
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
    actor: str
    time: str
    reason: str


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
    version of the model or was given up, or the alias is protected from ``tx.actor``.
    """
    _check(tx.connection, model, name, to)
    check_actor(tx.connection, model, name, tx.actor)
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


def point(tx: Transaction, model: str, name: str, to: str) -> Alias:
    """Point ``model@name`` at ``to``, wherever it is now; nothing is written when it is there already."""
    found = read(tx.connection, model, name)
    if found and found.version == to:
        return found
    return move(tx, model, name, to, found.revision if found else 0)


def protect(tx: Transaction, model: str, name: str, actors: list[str]) -> None:
    """Let ``actors`` alone move ``model@name`` from here on; an empty list lets everybody.

    Raises ``BadInput`` when it is protected already and ``tx.actor`` is not among those who may move it, or would
    not be afterwards (nobody locks themselves out by mistake).
    """
    _check_name(name)
    check_actor(tx.connection, model, name, tx.actor)
    actors = sorted(set(actors))
    if actors and tx.actor not in actors:
        raise BadInput(
            f"name yourself ({tx.actor}) among the actors of {model}@{name}, or let one of them do it"
        )
    if actors == protectors(tx.connection, model, name):
        return
    document = tx.connection.execute(select(models.c.document).where(models.c.name == model)).scalar_one()
    where = (alias_actors.c.model == model) & (alias_actors.c.alias == name)
    tx.connection.execute(delete(alias_actors).where(where))
    for actor in actors:
        tx.connection.execute(insert(alias_actors).values(model=model, alias=name, actor=actor))
    tx.append("alias.protected", document, model=model, alias=name, actors=actors)


def protectors(connection: Connection, model: str, name: str) -> list[str]:
    """Who alone may move ``model@name``; empty for an alias that is not protected."""
    where = (alias_actors.c.model == model) & (alias_actors.c.alias == name)
    return list(connection.scalars(select(alias_actors.c.actor).where(where).order_by(alias_actors.c.actor)))


def check_actor(connection: Connection, model: str, name: str, actor: str) -> None:
    """Raises ``BadInput`` unless ``actor`` may move ``model@name``."""
    allowed = protectors(connection, model, name)
    if allowed and actor not in allowed:
        raise BadInput(
            f"{model}@{name} is protected: {', '.join(allowed)} may move it, {actor} may not; ask one of them"
        )


def history(connection: Connection, model: str, name: str, last: int | None = None) -> list[Move]:
    """The moves of an alias with who made them, when and why, oldest first; ``last``: so many of the newest."""
    where = (alias_moves.c.model == model) & (alias_moves.c.alias == name)
    query = select(alias_moves, events.c.body).join(events, events.c.sequence == alias_moves.c.event)
    rows = connection.execute(query.where(where).order_by(alias_moves.c.revision.desc()).limit(last)).all()
    return [_made(row, Event.from_body(row.body)) for row in reversed(rows)]


def _made(row: Row, event: Event) -> Move:
    return Move(row.revision, row.version, row.previous, row.event, event.actor, event.time, event.reason)


def was_at(connection: Connection, model: str, name: str, version: str) -> bool:
    """Whether ``model@name`` ever pointed at ``version``."""
    where = (
        (alias_moves.c.model == model) & (alias_moves.c.alias == name) & (alias_moves.c.version == version)
    )
    return connection.execute(select(alias_moves.c.revision).where(where).limit(1)).first() is not None


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadInput(f"alias '{name}': use lower-case letters, digits, '_' and '-', and not v1, v2, ...")


def _check(connection: Connection, model: str, name: str, to: str) -> None:
    _check_name(name)
    retirement.refuse(connection, to)
    if connection.scalar(select(versions.c.model).where(versions.c.digest == to)) != model:
        raise BadInput(f"{to} is not a version of model {model}; an alias points only at its own model's")


def _moved(connection: Connection, model: str, name: str, expected_revision: int) -> StateMoved:
    old, found = _at(connection, model, name, expected_revision), read(connection, model, name)
    new = _label(connection, found.version if found else None)
    revision = found.revision if found else 0
    if not 0 <= expected_revision < revision:  # it was never there
        return StateMoved(
            f"{model}@{name} is at revision {revision} ({new}), not {expected_revision}; look at it and decide again"
        )
    moved = f"moved from {old} to {new}" if old != new else f"moved away from {old} and back"
    return StateMoved(f"the {name} {moved}; compare with it and decide again")


def _at(connection: Connection, model: str, name: str, revision: int) -> str:
    where = (alias_moves.c.model == model) & (alias_moves.c.alias == name)
    query = select(alias_moves.c.version).where(where & (alias_moves.c.revision == revision))
    return _label(connection, connection.scalar(query))


def _label(connection: Connection, digest: str | None) -> str:
    if digest is None:
        return "nothing"
    number = connection.scalar(select(versions.c.number).where(versions.c.digest == digest))
    return f"v{number}"
