"""What must hold in a workspace that a process left behind, however it died."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meristem.ecosystem.ledger import KINDS
from meristem.errors import BadInput, MeristemError
from meristem.store.canonical import PREFIX, digest_bytes
from meristem.workspace import Workspace

State = dict[str, Any]
COLLECTED = "store.collected"  # counts what one run of gc found: less after a run that was cut off


def state(ws: Workspace) -> State:
    """Everything that a user can see, without clocks: equal for two runs that did the same work."""
    events = list(ws.events())
    return {
        "models": {model.name: model.digest for model in ws.models()},
        "versions": {v.label: v.digest for model in ws.models() for v in ws.versions(model.name)},
        "aliases": {
            f"{a.model}@{a.name}": (a.version, a.revision)
            for model in ws.models()
            for a in ws.aliases(model.name)
        },
        "records": {
            entry.id: (entry.digest, entry.status, entry.result)
            for kind in KINDS
            for entry in ws.records(kind)
        },
        "data": {entry.label: entry.digest for entry in ws.data()},
        "events": [(event.kind, event.subject) for event in events if event.kind != COLLECTED],
        "moves": dict(
            Counter(f"{e.data['model']}@{e.data['alias']}" for e in events if e.kind == "alias.moved")
        ),
    }


def read(folder: Path) -> State:
    """The state of the workspace in ``folder``. Raises ``MeristemError`` when it cannot be opened."""
    ws = Workspace.open(folder, actor="auditor")
    try:
        return state(ws)
    finally:
        ws.close()


def restart(folder: Path, before: State, after: State, *, atomic: bool, acknowledged: bool) -> list[str]:
    """Open a workspace as the next command would and list what is wrong; an empty list is what is wanted.

    ``acknowledged``: the process had said that its work was done.
    """
    ws = Workspace.open(folder, actor="auditor")
    try:
        found = state(ws)
        problems = [*integrity(folder), *_pointers(ws, found), *_packs(folder), *ws.verify().problems]
    finally:
        ws.close()
    if acknowledged and found != after:
        problems.append(f"it said that it was done, and is not: {difference(found, after)}")
    if atomic and found not in (before, after):
        problems.append(f"half of the work shows: {difference(found, after)}")
    for name, record in before["records"].items():
        if name.startswith("release-") and found["records"].get(name) != record:
            problems.append(f"{name} was acknowledged before and is gone")
    return problems


def named_packs(folder: Path) -> set[str]:
    """File names of the packs that the database's index names, from a consistent read."""
    with sqlite3.connect(folder / ".meristem/meristem.db") as connection:
        names = {row[0] for row in connection.execute("select distinct pack from blobs")}
    connection.close()
    return {f"{name.removeprefix(PREFIX)}.safetensors" for name in names}


def packs(folder: Path) -> list[str]:
    """What each pack holds: their names never come again."""
    held = []
    for path in (folder / ".meristem/packs").glob("[!.]*.safetensors"):
        body = path.read_bytes()
        entries = json.loads(body[8 : 8 + struct.unpack("<Q", body[:8])[0]])
        held.append(" ".join(sorted(entries.keys() - {"__metadata__"})))
    return sorted(held)


def expire_leases(folder: Path) -> None:
    """As if so much time had passed that the dead process's leases ran out."""
    with sqlite3.connect(folder / ".meristem/meristem.db") as connection:
        connection.execute("update leases set expires = 0")
    connection.close()


def temporaries(folder: Path) -> list[str]:
    """Unfinished files in the store."""
    return sorted(path.name for path in (folder / ".meristem/packs").glob(".*"))


def difference(found: State, wanted: State) -> str:
    parts = [
        f"{key}: {found.get(key)} instead of {wanted.get(key)}"
        for key in wanted
        if found.get(key) != wanted[key]
    ]
    return "; ".join(parts)[:600]


def integrity(folder: Path) -> Iterator[str]:
    """SQLite's own opinion."""
    with sqlite3.connect(folder / ".meristem/meristem.db") as connection:
        for pragma in ("integrity_check", "foreign_key_check"):
            for row in connection.execute(f"PRAGMA {pragma}"):
                if row != ("ok",):
                    yield f"SQLite's {pragma}: {row}"
    connection.close()


def _pointers(ws: Workspace, found: State) -> Iterator[str]:
    """Every alias resolves to bytes that match, and has moved as often as its revision says."""
    for alias, (version, revision) in found["aliases"].items():
        if (moves := found["moves"].get(alias, 0)) != revision:
            yield f"{alias} is at revision {revision} and has {moves} events alias.moved"
        try:
            if ws.version(alias).digest != version:
                yield f"{alias} does not resolve to its version"
            content = ws.store.document(ws.version(alias).content)
            while content:
                for digest in (*content["tensors"].values(), *content["files"].values()):
                    ws.store.read_blob(digest)
                content = ws.store.document(content["base"]) if content["base"] else None
        except MeristemError as error:
            yield f"{alias}: {error}"


def _packs(folder: Path) -> Iterator[str]:
    """A pack has its name only when it is whole, whether anything names it or not."""
    for path in (folder / ".meristem/packs").glob("*.safetensors"):
        body = path.read_bytes()
        length = 8 + struct.unpack("<Q", body[:8])[0] if len(body) >= 8 else 8
        if digest_bytes(body[:length]) != f"{PREFIX}{path.stem}":
            yield f"{path.name}: its header is not the one that names it"
            continue
        entries = json.loads(body[8:length])
        end = max((e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"), default=0)
        if len(body) != length + end:
            yield f"{path.name}: a pack of {len(body)} bytes where its header says {length + end}"


def refuses_old_schema(folder: Path) -> bool:
    """Whether the workspace wants to be migrated before it is opened."""
    try:
        Workspace.open(folder).close()
    except BadInput as error:
        return "migrate" in str(error)
    return False
