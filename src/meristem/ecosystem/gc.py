"""``store gc``: retire what the retention rules give up, and give back the space of what nothing needs.

Three steps, each safe to be cut off and safe beside writers:

1. look, in one snapshot: what is to be retired, and which blobs nothing names then;
2. look again, under the write lock, at everything that happened since; record what is retired, then drop the index
   rows of the dead blobs that no writer leases;
3. pack by pack, under the write lock, remove those that no row and no lease names; write those anew of which less than
   half is needed.

The index of blobs says what a pack is needed for. Should it have lost rows, nothing is removed.

Documents and events are never removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from meristem.ecosystem import records, retirement, scratch
from meristem.ecosystem.reach import Reach, blobs_of, given_up, named_among, named_blobs, read, sort_blobs
from meristem.ecosystem.retirement import RETIRED, Noun
from meristem.errors import Tampered
from meristem.store import compaction, evidence, index, leases
from meristem.store.compaction import Waste
from meristem.store.evidence import Event
from meristem.store.schema import assets, blobs, events, versions
from meristem.store.store import Store, Transaction

WEIGHTS = ("adapter", "experts", "full")
_DAY = 86400.0
_AT_ONCE = 200  # retired in one transaction: other writers wait for each
Progress = Callable[[str, int, int], None]


@dataclass
class Collection:
    """What a run took away, or would take away (``dry_run``). ``problems``: what it left alone, and why."""

    dry_run: bool
    retired: dict[str, list[str]] = field(default_factory=dict)  # kind -> labels
    blobs: int = 0
    packs: int = 0
    repacked: int = 0
    leftovers: int = 0
    folders: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def record(self) -> records.Collection:
        return records.Collection(
            retired={kind: len(labels) for kind, labels in self.retired.items()},
            blobs=self.blobs,
            packs=self.packs,
            repacked=self.repacked,
            leftovers=self.leftovers,
            folders=self.folders,
            bytes=self.bytes,
        )

    @property
    def anything(self) -> bool:
        return any(self.record().model_dump().values())


@dataclass(frozen=True)
class _Expired:
    noun: Noun
    kind: str
    digest: str
    label: str
    reason: str


@dataclass(frozen=True)
class _Look:
    """What one snapshot says: valid for what is not touched by an event after ``sequence``."""

    sequence: int
    retire: list[_Expired]
    needed: set[str]
    dead: set[str]
    lost: set[str]  # documents whose blobs nothing keeps
    waste: Waste
    folders: list[Path]
    leases: bool  # some have run out


def collect(
    store: Store,
    actor: str,
    retention: Mapping[str, float],
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Collection:
    """Collect the garbage of ``store`` under the rules ``retention`` (days per kind).

    Nothing is written with ``dry_run``. Raises ``Tampered`` when documents are damaged or the index lacks a blob that
    they name, and ``BadInput`` when they are of a newer Meristem: what cannot be read might name what would be removed.
    """
    store.refuse_foreign_packs()
    runs = scratch.runs(store)  # before the look: see there
    with store.database.read() as connection:
        look = _look(store, connection, retention, runs, progress)
    found = Collection(dry_run)
    if dry_run:
        _tell(store, look, found)
        return found
    _drop(store, actor, look, found)
    _compact(store, look, found, progress)
    for name in _leftovers(store):
        store.packs.discard(name)
        found.leftovers += 1
    found.folders = scratch.remove(look.folders)
    if found.anything:
        with store.transaction(actor, "what nothing needs any more was removed") as tx:
            document = found.record().document()
            tx.append("store.collected", tx.add_document(document), **_numbers(document))
    return found


@dataclass(frozen=True)
class Reindexed:
    """How many packs and blobs the index knows now, and which blobs that documents name are in no pack."""

    packs: int
    blobs: int
    missing: list[str]


def reindex(store: Store, progress: Callable[[int, int], None] | None = None) -> Reindexed:
    """Make the index of blobs again from the packs alone, in one transaction.

    Raises ``Tampered`` for a pack with a damaged header, ``EnvironmentFailure`` when the packs are not there at all;
    then nothing has changed.
    """
    packs, count = store.rebuild_index(progress)
    with store.database.read() as connection:
        held = set(connection.scalars(select(blobs.c.digest)))
        lost = given_up(connection, retirement.all_given_up(connection))
        missing = {blob for blob in named_blobs(connection, lost) if blob not in held}
    return Reindexed(packs, count, sorted(missing))


def _look(
    store: Store,
    connection: Connection,
    retention: Mapping[str, float],
    runs: list[Path],
    progress: Progress | None,
) -> _Look:
    sequence, _ = evidence.head(connection)
    now = store.database.now(connection)
    gone = retirement.all_given_up(connection)
    retire = _expired(connection, retention, gone, now) if retention else []
    lost = given_up(connection, gone | {item.digest for item in retire})
    step = (lambda done, total: progress("documents", done, total)) if progress else None
    needed, dead = sort_blobs(connection, lost, step)
    dead -= leases.held(connection, now)
    return _Look(
        sequence=sequence,
        retire=retire,
        needed=needed,
        dead=dead,
        lost=lost,
        waste=compaction.survey(store, connection, dead),
        folders=[
            *scratch.stale_runs(connection, runs),
            *scratch.stale_journals(store, connection),
            *scratch.stale_checkouts(store, lost),
        ],
        leases=leases.any_expired(connection, now),
    )


def _expired(
    connection: Connection, retention: Mapping[str, float], gone: set[str], now: float
) -> list[_Expired]:
    """The versions and assets that are older than their kind is kept, and that nothing in use reaches."""
    reach = Reach(connection)
    used = reach.in_use() | gone
    found: list[_Expired] = []

    def consider(noun: Noun, kind: str, digest: str, label: str) -> None:
        if kind in retention and now - _born(connection, noun, digest) > retention[kind] * _DAY:
            rule = f"retention: {kind} {retention[kind]:g} days"
            found.append(_Expired(noun, kind, digest, label, rule))

    if retention.keys() & set(WEIGHTS):
        for row in connection.execute(select(versions).order_by(versions.c.model, versions.c.number)).all():
            if row.digest not in used:
                kind = read(connection, row.content)["kind"]
                consider("version", kind, row.digest, f"{row.model}@v{row.number}")
    query = select(assets).order_by(assets.c.kind, assets.c.name, assets.c.number)
    for row in connection.execute(query.where(assets.c.kind.in_(list(retention)))).all():
        if row.digest not in used and not _recipe_in_use(connection, row, used):
            consider("asset", row.kind, row.digest, f"{row.name}@v{row.number}")
    return found


def _recipe_in_use(connection: Connection, row: Any, used: set[str]) -> bool:
    """Versions and plans name a recipe's settings, not the asset that holds them."""
    return row.kind == "recipe" and read(connection, row.digest)["facts"].get("document") in used


def _born(connection: Connection, noun: Noun, digest: str) -> float:
    """When the newest event said that the bytes of ``digest`` are there."""
    kinds = [f"{noun}.{verb}" for verb in ("created", "added", retirement.RESTORED)]
    query = select(events.c.body).where((events.c.subject == digest) & events.c.kind.in_(kinds))
    body = connection.scalar(query.order_by(events.c.sequence.desc()).limit(1))
    if body is None:
        raise Tampered(f"{noun} {digest} has no event; `meristem log verify` lists everything that is wrong")
    return datetime.fromisoformat(Event.from_body(body).time).timestamp()


def _drop(store: Store, actor: str, look: _Look, found: Collection) -> None:
    """Step 2. What happened since the look is looked at again: nothing else can have come into use."""
    for start in range(0, len(look.retire), _AT_ONCE):
        with store.transaction(actor) as tx:
            _retire(tx, look.retire[start : start + _AT_ONCE], look.sequence, found)
    if not (look.dead or look.leases):
        return
    with store.transaction(actor) as tx:
        now = store.database.now(tx.connection)
        leases.drop_expired(tx.connection, now)
        fresh = Reach(tx.connection).since(look.sequence)
        dead = look.dead - leases.held(tx.connection, now) - blobs_of(tx.connection, fresh)
        index.forget(tx.connection, dead)
        found.blobs = len(dead)


def _retire(tx: Transaction, items: list[_Expired], sequence: int, found: Collection) -> None:
    fresh = Reach(tx.connection).since(sequence)
    spared = fresh | retirement.all_given_up(tx.connection)  # by another collection, since the look
    for item in items:
        if item.digest not in spared:
            retirement.give_up(
                tx, item.noun, item.digest, RETIRED, item.reason, label=item.label, kind=item.kind
            )
            found.retired.setdefault(item.kind, []).append(item.label)


def _compact(store: Store, look: _Look, found: Collection, progress: Progress | None) -> None:
    named = partial(named_among, known=look.needed)
    with store.database.read() as connection:
        waste = compaction.survey(store, connection, set())
    found.problems += waste.problems
    total = len(waste.unused) + len(waste.thin)
    for done, pack in enumerate((*waste.unused, *waste.thin), start=1):
        unused = pack in waste.unused
        try:
            freed = (compaction.remove_unused if unused else compaction.repack)(store, pack, named)
        except Tampered as error:
            found.problems.append(f"{error}; left as it is, `meristem log verify` says more")
        else:
            if freed is not None:  # else somebody came to need it, or does the same: the next run sees to it
                found.packs += unused
                found.repacked += not unused
                found.bytes += freed
        if progress:
            progress("packs", done, total)


def _leftovers(store: Store) -> list[str]:
    """Temporaries of writers that cannot win any more: untouched for longer than a lease lasts, and not leased.

    An upload's age counts from its beginning, however long it takes.
    """
    old = [name for name, age in store.packs.leftovers() if age > store.lease_seconds]
    return compaction.abandoned(store, old)


def _tell(store: Store, look: _Look, found: Collection) -> None:
    for item in look.retire:
        found.retired.setdefault(item.kind, []).append(item.label)
    found.blobs = len(look.dead)
    found.packs, found.repacked = len(look.waste.unused), len(look.waste.thin)
    found.bytes = sum(look.waste.unused.values()) + sum(look.waste.thin.values())
    found.leftovers, found.folders = len(_leftovers(store)), len(look.folders)
    found.problems = look.waste.problems


def _numbers(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "schema"}
