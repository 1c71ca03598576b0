"""Seeded bugs: each must be found by the sweep, or the sweep proves nothing. Only the tests plant them."""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meristem.store.store import Store


def plant(name: str) -> None:
    """Patch the present process; an empty name does nothing."""
    if name:
        BUGS[name]()


def pointer_before_pack() -> None:
    """The transaction that names a pack commits before the pack has its name."""
    put, transaction = Store.put, Store.transaction
    late: list[tuple[Path, Path]] = []

    def early(store: Store, *args: Any, **kwargs: Any) -> Any:
        folder = store.root / "packs"
        before = set(folder.glob("*.safetensors"))
        stored = put(store, *args, **kwargs)
        for pack in set(folder.glob("*.safetensors")) - before:
            late.append((pack.with_name(f".late-{pack.stem}"), pack))
            pack.rename(late[-1][0])
        return stored

    @contextmanager
    def hasty(store: Store, *args: Any, **kwargs: Any) -> Any:
        with transaction(store, *args, **kwargs) as tx:
            yield tx
        while late:
            hidden, pack = late.pop()
            hidden.rename(pack)

    Store.put, Store.transaction = early, hasty  # type: ignore[method-assign]


def pack_not_synced() -> None:
    """No file is synced before it gets its name."""
    _skip_syncs(lambda path: path.is_file())


def folder_not_synced() -> None:
    """No folder is synced after a rename into it."""
    _skip_syncs(lambda path: path.is_dir())


def commit_not_synced() -> None:
    """SQLite is told not to wait for the disk."""
    connect = sqlite3.connect

    class Hasty(sqlite3.Connection):
        def execute(self, statement: str, *args: Any) -> Any:
            return super().execute(statement.replace("synchronous=FULL", "synchronous=OFF"), *args)

    sqlite3.connect = lambda *args, **kwargs: connect(*args, **{**kwargs, "factory": Hasty})  # type: ignore[assignment]


def _skip_syncs(of: Any) -> None:
    fsync = os.fsync

    def skipping(descriptor: int) -> None:
        if not of(Path(f"/proc/self/fd/{descriptor}").readlink()):
            fsync(descriptor)

    os.fsync = skipping  # type: ignore[assignment]


BUGS = {
    bug.__name__: bug for bug in (pointer_before_pack, pack_not_synced, folder_not_synced, commit_not_synced)
}
