"""Copies of a workspace with one thing altered, to show that ``log verify`` finds it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from meristem.ecosystem import versions
from meristem.errors import MeristemError
from meristem.store.local_packs import LocalPacks
from meristem.store.store import PACKS_FOLDER, Store
from meristem.workspace import STORE_FOLDER, Workspace

MODEL = "support"


def tamper_with_copies(ws: Workspace) -> Iterator[tuple[str, list[str]]]:
    """``(what was altered, the problems found)`` for a flipped weight byte, an edited event and a moved pointer."""
    alterations = {
        "one bit of a weight flipped": _flip_weight,
        "one event's actor renamed": _edit_event,
        "the champion moved behind the log's back": _move_champion,
    }
    for what, alter in alterations.items():
        with tempfile.TemporaryDirectory(dir=ws.root, prefix="tampered-") as name:
            copy = Path(name) / "copy"
            copy.mkdir()
            shutil.copy(ws.root / "meristem.yaml", copy)
            _copy_store(ws.root / STORE_FOLDER, copy / STORE_FOLDER)
            alter(copy / STORE_FOLDER)
            altered = Workspace.open(copy)
            problems = altered.verify().problems
            altered.close()
        if not problems:
            raise MeristemError(f"log verify did not notice a copy with {what}")
        yield what, problems


def _copy_store(source: Path, target: Path) -> None:
    shutil.copytree(source / "packs", target / "packs")
    with (
        closing(sqlite3.connect(source / "meristem.db")) as old,
        closing(sqlite3.connect(target / "meristem.db")) as new,
    ):
        old.backup(new)


def _flip_weight(store: Path) -> None:
    """In the middle of a tensor of the champion: the same index that ``model checkout`` reads says where it lies."""
    opened = Store(store)
    with opened.database.read() as connection:
        champion = versions.content_of(connection, versions.resolve(connection, f"{MODEL}@champion").content)
    location = opened.location(min(champion.tensors.values()))
    opened.database.close()
    with LocalPacks(store / PACKS_FOLDER).path(location.pack).open("r+b") as pack:
        pack.seek(location.offset + location.length // 2)
        byte = pack.read(1)[0]
        pack.seek(-1, 1)
        pack.write(bytes([byte ^ 1]))


def _edit_event(store: Path) -> None:
    _execute(
        store,
        "UPDATE events SET body = CAST(replace(CAST(body AS TEXT), '\"demo\"', '\"someone\"') AS BLOB) "
        "WHERE sequence = (SELECT max(sequence) FROM events)",
    )


def _move_champion(store: Path) -> None:
    _execute(
        store,
        "UPDATE aliases SET version = (SELECT digest FROM versions WHERE model = aliases.model "
        f"ORDER BY number DESC LIMIT 1) WHERE alias = 'champion' AND model = '{MODEL}'",
    )


def _execute(store: Path, statement: str) -> None:
    with closing(sqlite3.connect(store / "meristem.db")) as connection, connection:
        connection.execute(statement)
