"""Lines of versions and assets to collect or delete, and all that a store holds."""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import select
from tests.ecosystem import hf

from meristem.ecosystem import assets, models, versions
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import Asset, Version
from meristem.ecosystem.versions import VersionEntry
from meristem.store import schema
from meristem.store.canonical import digest_bytes
from meristem.store.packs import Blob
from meristem.store.sqlite import SQLite
from meristem.store.store import Store


def age(monkeypatch, days: float) -> None:
    """The database's clock runs ahead for ``gc`` alone: leases are as they were."""
    from meristem.ecosystem import gc

    inner = gc._born
    monkeypatch.setattr(gc, "_born", lambda *arguments: inner(*arguments) - days * 86400)


def commit(store: Store, number: int) -> VersionEntry:
    """A successor of the champion of ``base`` in which one tensor changed; it becomes the challenger."""
    folder = store.root.parent / f"{store.root.name}-v{number}"
    tensors = {**hf.weights(), "b.weight": hf.weights(number)["b.weight"]}
    return models.commit(store, "kim", "base", hf.full(folder, tensors))


def row(store: Store, of: VersionEntry, **fields: Any) -> VersionEntry:
    """A version with the content of ``of`` and that as its parent."""
    with store.transaction("kim") as tx:
        content = versions.content_of(tx.connection, of.content)
        record = Version(
            model=of.model, content=of.content, base=of.record.base, parents=[of.digest], **fields
        )
        return versions.create(tx, content, record)


def dataset(
    store: Store,
    name: str,
    *,
    kind: str = "dataset",
    blob: Blob | None = None,
    beside: list[Blob] | None = None,
    facts: dict[str, Any] | None = None,
) -> AssetEntry:
    """An asset with one file; ``beside`` lies in the same pack and nothing names it."""
    blob = blob or Blob.file(f"{kind} {name}".encode())
    stored = store.put([blob, *(beside or [])])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
        record = Asset(kind=kind, name=name, files={"rows.jsonl": blob.digest}, facts=facts or {})
        return assets.add(tx, record)


def suite(store: Store, name: str, items: str) -> AssetEntry:
    body = items.encode()
    return dataset(store, name, kind="suite", blob=Blob.file(body), facts={"digest": digest_bytes(body)})


def tree(store: Store) -> dict[str, Any]:
    """Every row of every table, and the digest of every file but the database's."""
    assert isinstance(store.database, SQLite)
    found: dict[str, Any] = {}
    with store.database.read() as connection:
        for table in schema.metadata.sorted_tables:
            found[table.name] = sorted(map(tuple, connection.execute(select(table))), key=repr)
    for path in sorted(store.root.rglob("*")):
        if path.is_file() and not path.name.startswith("meristem.db"):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
