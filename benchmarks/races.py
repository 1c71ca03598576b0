"""Eight processes judge against one champion and promote at the same moment; one wins, whatever the back end.

    python -m benchmarks.races

On SQLite and on a PostgreSQL that it starts. Exit code 1 unless every round had exactly one winner.

In every round each process records a passed decision on a version of its own against the champion that stands there,
waits for the others, and promotes. Counted: rounds with exactly one winner, losers that were told `StateMoved`, and
afterwards whether the chain, the pointers and the releases agree (`log verify`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import struct
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from tests.servers import postgresql_server

from meristem.ecosystem import aliases, audit, ledger, versions
from meristem.ecosystem.records import Content, Decision, Model, Version
from meristem.errors import StateMoved
from meristem.release import rollout
from meristem.store.packs import Blob
from meristem.store.schema import models
from meristem.store.store import Store

Place = tuple[str, str | None]
MODEL = "support"
POLICY = {"schema": "meristem/policy/v1", "gates": [], "approvals": 0}


def race(place: Place, processes: int, rounds: int) -> dict[str, Any]:
    """Run the race on a store with tables and nothing in them; returns what happened."""
    _prepare(Store(Path(place[0]), place[1]), 2 * processes + 1)
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    runners = [
        context.Process(target=_run, args=(place, index, processes, rounds, barrier, queue))
        for index in range(processes)
    ]
    started = time.perf_counter()
    for runner in runners:
        runner.start()
    told = [queue.get(timeout=600) for _ in range(processes * rounds)]
    for runner in runners:
        runner.join()
    seconds = time.perf_counter() - started
    store = Store(Path(place[0]), place[1])
    with store.database.read() as connection:
        champion = aliases.champion(connection, MODEL)
        releases = len(ledger.entries(connection, "release", model=MODEL))
    problems = audit.verify(store).problems
    store.database.close()
    winners = Counter(number for number, outcome in told if outcome == "won")
    return {
        "back end": "PostgreSQL" if place[1] else "SQLite",
        "processes": processes,
        "rounds": rounds,
        "rounds with one winner": sum(winners[number] == 1 for number in range(rounds)),
        "rounds without or with several winners": sum(winners[number] != 1 for number in range(rounds)),
        "told that the champion moved": sum(outcome == "moved" for _, outcome in told),
        "other errors": sorted({outcome for _, outcome in told} - {"won", "moved"}),
        "releases": releases,
        "champion revision": champion.revision,
        "problems found by log verify": problems,
        "seconds": round(seconds, 1),
    }


def _prepare(store: Store, count: int) -> None:
    """A model with ``count`` versions of one tensor each; the last one is its champion."""
    blobs = [Blob.tensor("F32", (1,), struct.pack("<f", number)) for number in range(count)]
    stored = store.put(blobs)
    with store.transaction("bench", "race") as tx:
        tx.add_blobs(stored)
        model = Model(name=MODEL, tier="foundation", base=None, source="folder race", fingerprint=None)
        digest = tx.add_document(model.document())
        tx.connection.execute(models.insert().values(name=MODEL, tier="foundation", document=digest))
        tx.append("model.added", digest, name=MODEL, tier="foundation", base=None)
        tx.add_document(POLICY)
        for blob in blobs:
            content = Content(kind="full", base=None, tensors={"w": blob.digest}, files={})
            record = Version(model=MODEL, content=content.digest, base=None, parents=[])
            made = versions.create(tx, content, record)
        aliases.move(tx, MODEL, aliases.CHAMPION, made.digest, 0)
    store.database.close()


def _run(place: Place, index: int, processes: int, rounds: int, barrier: Barrier, queue: Any) -> None:
    store = Store(Path(place[0]), place[1])
    store.database.busy_seconds = 120
    for number in range(rounds):
        decision = _decide(store, f"judge-{index}", 2 * index + number % 2 + 1)
        barrier.wait()
        try:
            rollout.promote(store, f"judge-{index}", decision)
            outcome = "won"
        except StateMoved as error:
            outcome = "moved" if "champion moved" in str(error) else str(error)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        queue.put((number, outcome))
        barrier.wait()
    store.database.close()


def _decide(store: Store, actor: str, version: int) -> ledger.Entry:
    with store.transaction(actor, "race") as tx:
        champion = aliases.champion(tx.connection, MODEL)
        decision = Decision(
            model=MODEL,
            version=versions.resolve(tx.connection, f"{MODEL}@v{version}").digest,
            champion=champion.version,
            champion_revision=champion.revision,
            plan=None,
            policy=tx.add_document(POLICY),
            evaluations=[],
            gates=[],
            outcome="pass",
            approvals_needed=0,
        )
        return ledger.open_record(tx, "decision", decision, MODEL, status="pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sweep-races.json")
    given = parser.parse_args()
    with postgresql_server() as server:
        os.environ.update(server.environ)
        told = [_fresh(url, given.processes, given.rounds) for url in (None, server.database())]
    given.out.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))
    sys.exit(
        any(
            one["rounds with one winner"] != one["rounds"] or one["problems found by log verify"]
            for one in told
        )
    )


def _fresh(url: str | None, processes: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), url)
        store.database.create()
        store.database.close()
        return race((folder, url), processes, rounds)


if __name__ == "__main__":
    main()
