"""One process beside others on one store: ``write NAME COUNT`` commits data sets, ``gc`` collects until stdin ends.

A writer names its new rows and rows that others store as well, and puts some that it never names.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from meristem.ecosystem import assets, gc
from meristem.ecosystem.records import Asset
from meristem.store.packs import Blob
from meristem.store.store import Store


def write(store: Store, name: str, count: int) -> None:
    for number in range(count):
        own = Blob.file(f"{name} {number}".encode())
        shared = Blob.file(f"shared {number}".encode())
        store.put([Blob.file(f"{name} {number} never named".encode())])
        stored = store.put([own, shared])
        with store.transaction(name) as tx:
            tx.add_blobs(stored)
            files = {"own": own.digest, "shared": shared.digest}
            assets.add(tx, Asset(kind="dataset", name=f"{name}-{number}", files=files))


def collect(store: Store) -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    while not ended.is_set():
        found = gc.collect(store, "gc", {})
        assert not found.problems, found.problems


store = Store(Path(sys.argv[1]))
store.lease_seconds = float(sys.argv[2])
if sys.argv[3] == "write":
    write(store, sys.argv[4], int(sys.argv[5]))
else:
    collect(store)
store.database.close()
