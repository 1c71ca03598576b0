"""Models: the named nodes of the tree foundation -> industrial -> application."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from sqlalchemy import Connection, insert, select

from meristem._version import __version__
from meristem.ecosystem import aliases, retirement, sources, versions
from meristem.ecosystem.folders import Progress, ingest
from meristem.ecosystem.records import Content, Model, Tier, Version
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.store.schema import models as table
from meristem.store.store import Store, Stored, read_document

TIERS = ("foundation", "industrial", "application")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadInput(f"{what} name '{name}': use lower-case letters, digits, '.', '_' and '-' (64 at most)")


def add(
    store: Store,
    actor: str,
    name: str,
    tier: str,
    source: str | None,
    base: str | None,
    progress: Progress | None = None,
    fetching: Progress | None = None,
) -> VersionEntry:
    """Register a model and its first version, which becomes its champion.

    Without ``source`` a model starts from its base's champion as it is. The same call again gives the same version,
    whether the first was interrupted or not; another model of the same name is refused. ``progress`` is told bytes
    that are stored, ``fetching`` those that come from a hub.
    """
    base_entry = _check(store, name, tier, source, base)
    source = sources.pinned(source) if source else None
    print_ = sources.fingerprint(source) if source else None
    known = _same_source(store, print_) if print_ else None
    origin = sources.name(source)
    reason = f"model {name} added from {origin if source else f'its base {base}'}"
    line = base_entry.model if base_entry else None
    record = Model(name=name, tier=cast(Tier, tier), base=line, source=origin, fingerprint=print_)
    with store.database.read() as connection:
        _is_there(connection, record)  # before anything is read or converted
    if source is None:
        assert base_entry is not None
        with store.database.read() as connection:
            content = versions.content_of(connection, base_entry.content)
        return _added(store, actor, reason, record, content, base_entry)
    if known is not None:
        return _added(store, actor, reason, record, known, base_entry)
    base_content = _full_content(store, base_entry) if base_entry else None
    with sources.open_source(source, fetching) as folder, ingest(folder, base_content) as (content, blobs):
        if there := _there(store, record, content, base_entry):
            return there
        stored = store.put(blobs, progress)
        return _added(store, actor, reason, record, content, base_entry, stored)


def _added(
    store: Store,
    actor: str,
    reason: str,
    record: Model,
    content: Content,
    base: VersionEntry | None,
    stored: Stored = Stored(None),
) -> VersionEntry:
    """The first version, made now, or by whoever added this very model before or meanwhile."""
    return (
        _there(store, record, content, base)
        or _register(store, actor, reason, record, content, base, stored)
        or _added(store, actor, reason, record, content, base, stored)
    )


def _there(store: Store, record: Model, content: Content, base: VersionEntry | None) -> VersionEntry | None:
    """The first version of this very model if it was added already; None when its name is free.

    Raises ``BadInput`` when another model has the name.
    """
    with store.database.read() as connection:
        if not _is_there(connection, record):
            return None
        first = versions.resolve(connection, f"{record.name}@v1")
    if (first.content, first.record.base) != (content.digest, base.digest if base else None):
        raise _namesake(record.name)
    return first


def _is_there(connection: Connection, record: Model) -> bool:
    found = connection.scalar(select(table.c.document).where(table.c.name == record.name))
    if found not in (None, record.digest):
        raise _namesake(record.name)
    return found is not None


def _namesake(name: str) -> BadInput:
    return BadInput(f"model '{name}' exists already; choose another name")


def commit(
    store: Store,
    actor: str,
    name: str,
    source: str | Path,
    reason: str = "",
    progress: Progress | None = None,
    fetching: Progress | None = None,
) -> VersionEntry:
    """Add weights that were made elsewhere (a folder, or a repository of the hub) as successor of the champion.

    Only tensors that the store does not hold are written. The new version becomes the challenger: it is released like
    any other, by a decision. The same folder again is the same version. Raises ``BadInput`` when nothing differs from
    the champion.
    """
    with store.database.read() as connection:
        get(connection, name)
        aliases.check_actor(connection, name, aliases.CHALLENGER, actor)
        parent = versions.by_digest(connection, aliases.champion(connection, name).version)
    source = sources.pinned(str(source))
    with (
        sources.open_source(source, fetching) as folder,
        ingest(folder, _full_content(store, parent)) as (content, blobs),
    ):
        if content.digest == parent.content:
            raise BadInput(f"{source}: these are the bytes of {parent.label}; there is nothing to commit")
        stored = store.put(blobs, progress)
        record = Version(
            model=name,
            content=content.digest,
            base=parent.record.base,
            parents=[parent.digest],
            tasks=parent.record.tasks,
            code={"meristem": __version__},
        )
        with store.transaction(
            actor, reason or f"successor of {parent.label} from {sources.name(source)}"
        ) as tx:
            tx.add_blobs(stored)
            entry = versions.create(tx, content, record)
            aliases.point(tx, name, aliases.CHALLENGER, entry.digest)
    return entry


def get(connection: Connection, name: str) -> Model:
    row = connection.execute(select(table).where(table.c.name == name)).first()
    if row is None:
        known = ", ".join(connection.scalars(select(table.c.name).order_by(table.c.name))) or "none yet"
        raise BadInput(f"unknown model '{name}'; models here: {known}")
    return Model.from_document(read_document(connection, row.document))


def all_models(connection: Connection) -> list[Model]:
    """Every model, bases before those that stand on them."""
    query = select(table.c.document)
    found = [Model.from_document(read_document(connection, digest)) for digest in connection.scalars(query)]
    bases = {model.name: model.base for model in found}

    def depth(name: str | None) -> int:
        return 0 if name is None else 1 + depth(bases.get(name))

    return sorted(found, key=lambda model: (TIERS.index(model.tier), depth(model.name), model.name))


def _check(store: Store, name: str, tier: str, source: str | None, base: str | None) -> VersionEntry | None:
    check_name("model", name)
    if tier not in TIERS:
        raise BadInput(f"tier '{tier}': choose one of {', '.join(TIERS)}")
    if tier == "foundation" and base is not None:
        raise BadInput("a foundation model has no --base; drop it or choose another tier")
    if tier != "foundation" and base is None:
        raise BadInput(f"a model of tier {tier} needs --base NAME, the model that it is tuned from")
    if source is None and base is None:
        raise BadInput(
            "a foundation model needs --source: `embedded`, hf:ORG/NAME or a local Hugging Face folder"
        )
    with store.database.read() as connection:
        if base is None:
            return None
        under = get(connection, base.partition("@")[0])
        if TIERS.index(under.tier) > TIERS.index(tier):
            raise BadInput(
                f"base '{base}' is of tier {under.tier}: a model of tier {tier} stands on one of its own or a "
                "wider tier (foundation, then industrial, then application)"
            )
        found = versions.resolve(connection, base)
        retirement.refuse(connection, found.digest)
        return found


def _same_source(store: Store, fingerprint: str) -> Content | None:
    """The content that an earlier model took from the same bytes: converted once, stored once."""
    with store.database.read() as connection:
        for model in all_models(connection):
            if model.fingerprint == fingerprint:
                first = versions.resolve(connection, f"{model.name}@v1")
                return versions.content_of(connection, first.content)
    return None


def _full_content(store: Store, entry: VersionEntry) -> str:
    """The digest of the full weights under a version (its own, or those its adapter sits on)."""
    with store.database.read() as connection:
        content = versions.content_of(connection, entry.content)
    return content.base or entry.content


def _register(
    store: Store,
    actor: str,
    reason: str,
    record: Model,
    content: Content,
    base: VersionEntry | None,
    stored: Stored,
) -> VersionEntry | None:
    """None where the name was taken meanwhile."""
    tasks = base.record.tasks if base and record.source == sources.BASE else []
    with store.transaction(actor, reason) as tx:
        if tx.connection.scalar(select(table.c.name).where(table.c.name == record.name)):
            return None
        tx.add_blobs(stored)
        digest = tx.add_document(record.document())
        tx.connection.execute(
            insert(table).values(name=record.name, tier=record.tier, base=record.base, document=digest)
        )
        tx.append("model.added", digest, name=record.name, tier=record.tier, base=record.base)
        first = Version(
            model=record.name,
            content=content.digest,
            base=base.digest if base else None,
            parents=[],
            tasks=tasks,
            code={"meristem": __version__},
        )
        entry = versions.create(tx, content, first)
        aliases.move(tx, record.name, aliases.CHAMPION, entry.digest, expected_revision=0)
    return entry
