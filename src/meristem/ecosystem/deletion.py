"""Deletion of a data set on a privacy request.

Its rows leave the store at once, and so does every method state that still holds some of them. What stays is its
document (digest and counts), and one event with the reason and every version that was trained on it: those learned from
it, which no deletion undoes.

One transaction records the deletion and drops the index rows; then every pack that holds the bytes, in whatever place,
is written anew without them, and what writers left unfinished goes. Cut off between the two, the same command finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy import Connection, select

from meristem.data.datasets import ROWS_FILE, load_body
from meristem.ecosystem import assets, ledger, retirement, scratch, versions
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.reach import (
    FINISHED,
    blobs_of,
    given_up,
    learners,
    named_among,
    named_blobs,
    read,
)
from meristem.ecosystem.records import Asset, Plan, Signal, Update
from meristem.ecosystem.retirement import DELETED
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, StateMoved, Tampered
from meristem.store import compaction, index, leases
from meristem.store.canonical import parse
from meristem.store.schema import assets as asset_table
from meristem.store.store import Store, Transaction

METHOD_STATE = "method-state"
_KEYS = ("task", "id")  # what identifies a row wherever it was copied to
Progress = Callable[[str, int, int], None]
Rows = set[tuple[str, str]]


@dataclass
class Deletion:
    """What was deleted, and what could not be. Each entry of the lists has a label and a digest.

    ``states`` are method states that held rows; the weights of ``versions`` learned from it. ``unfinished``: some of
    ``kept`` is to be deleted still, by the same command once more.
    """

    data: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unfinished: bool = False
    packs: int = 0
    bytes: int = 0
    folders: int = 0


def delete(
    store: Store, actor: str, reference: str, reason: str, progress: Progress | None = None
) -> Deletion:
    """Delete the data set ``name`` (all its versions), ``name@v2`` or a digest.

    Raises ``BadInput`` without a reason, and while an open update, plan or signal uses it; ``StateMoved`` while
    somebody stores the same bytes. Deleting it again finishes what was cut off.
    """
    if not reason.strip():
        raise BadInput("a deletion needs a reason: it is all that will be left to explain it")
    store.refuse_foreign_packs()
    found = Deletion()
    runs = scratch.runs(store)
    with store.transaction(actor, reason) as tx:
        wanted = _wanted(tx.connection, reference)
        digests = {entry.digest for entry in wanted}
        _refuse_in_use(tx.connection, wanted)
        learned = _learned(tx.connection, digests)
        found.versions = [{"label": version.label, "digest": version.digest} for version in learned]
        _give_up(store, tx, wanted, learned, reason, found)
        doomed, needed = _doomed(store, tx.connection, wanted, found, progress)
        index.forget(tx.connection, doomed)
        updates = _updates_on(tx.connection, digests)
    _purge(store, doomed, needed, found, progress)
    found.folders = scratch.remove(scratch.runs_of(runs, updates))
    return found


def _wanted(connection: Connection, reference: str) -> list[AssetEntry]:
    newest = assets.resolve(connection, "dataset", reference)
    if reference != newest.name:
        return [newest]
    return [entry for entry in assets.listed(connection, ["dataset"]) if entry.name == newest.name]


def _refuse_in_use(connection: Connection, wanted: list[AssetEntry]) -> None:
    labels = {entry.digest: entry.label for entry in wanted}
    for entry, data, remedy in _open_uses(connection):
        for digest in data:
            if digest in labels:
                raise BadInput(
                    f"data {labels[digest]} is used by {entry.id} ({entry.status}): {remedy}, then repeat"
                )


def _open_uses(connection: Connection) -> Iterator[tuple[Entry, Iterable[str], str]]:
    """Every open piece of work, the data sets it reads, and how to end it."""
    for entry in ledger.entries(connection, "update"):
        if entry.status not in FINISHED:
            update = entry.as_(Update)
            parent = versions.by_digest(connection, update.parent)
            earlier = [d for version in versions.ancestors(connection, parent) for d in version.record.data]
            close = f"`meristem update close {entry.id}`"
            yield (
                entry,
                [*update.data, *earlier],
                f"finish it (`meristem update resume {entry.id}`) or {close}",
            )
    for entry in ledger.entries(connection, "plan", status="open"):
        yield entry, entry.as_(Plan).data, f"close it with `meristem plan close {entry.id}`"
    for entry in ledger.entries(connection, "signal", status="pending"):
        yield entry, entry.as_(Signal).data, f"close it with `meristem signal close {entry.id}`"


def _learned(connection: Connection, data: set[str]) -> list[VersionEntry]:
    found = [versions.by_digest(connection, digest) for digest in learners(connection, data)]
    return sorted(found, key=lambda version: (version.model, version.number))


def _give_up(
    store: Store,
    tx: Transaction,
    wanted: list[AssetEntry],
    learned: list[VersionEntry],
    reason: str,
    found: Deletion,
) -> None:
    """The events, one for each data set and for each method state that holds its rows."""
    deleted = retirement.all_deleted(tx.connection)
    new = [entry for entry in wanted if entry.digest not in deleted]
    rows, digests = _rows(store, tx.connection, new), {entry.digest for entry in new}
    for entry in new:
        retirement.give_up(
            tx,
            "asset",
            entry.digest,
            DELETED,
            reason,
            label=entry.label,
            kind=entry.kind,
            versions=found.versions,
        )
    for entry in wanted:
        event = retirement.event_of(tx.connection, entry.digest)
        assert event is not None
        found.data.append({"label": entry.label, "digest": entry.digest, "event": event.sequence})
    for digest, label in _states(learned).items() if new else ():
        if retirement.event_of(tx.connection, digest):
            continue
        if _holds_rows(store, tx.connection, digest, rows):
            of = sorted(digests)
            event = retirement.give_up(
                tx, "asset", digest, DELETED, reason, label=label, kind=METHOD_STATE, held_rows_of=of
            )
            found.states.append({"label": label, "digest": digest, "event": event.sequence})
        else:
            found.kept.append(f"{label}: no row of it found there")


def _states(learned: list[VersionEntry]) -> dict[str, str]:
    """The method states of versions, with what to call each."""
    found: dict[str, str] = {}
    for version in learned:
        if digest := version.record.assets.get(METHOD_STATE):
            found.setdefault(digest, f"method state of {version.label}")
    return found


def _rows(store: Store, connection: Connection, wanted: list[AssetEntry]) -> Rows | None:
    """What identifies the rows of the data sets; None when some of them cannot be read any more."""
    return rows_in(_read(store, connection, entry.record.files.get(ROWS_FILE, "")) for entry in wanted)


def rows_in(bodies: Iterable[bytes | None]) -> Rows | None:
    """What identifies the rows of data sets' files; None when one of them cannot be read."""
    found: Rows = set()
    for body in bodies:
        if body is None:
            return None
        found |= {(str(row["task"]), str(row["id"])) for row in load_body(body)}
    return found


def _holds_rows(store: Store, connection: Connection, state: str, rows: Rows | None) -> bool:
    asset = Asset.from_document(read(connection, state))
    return hold_rows((_read(store, connection, digest) for digest in asset.files.values()), rows)


def hold_rows(bodies: Iterable[bytes | None], rows: Rows | None) -> bool:
    """Whether the files of a method state hold one of ``rows`` (None: any). What cannot be read counts as held."""
    return any(body is None or _has_row(parse(body), rows) for body in bodies)


def _has_row(value: Any, rows: Rows | None) -> bool:
    if isinstance(value, dict):
        if all(isinstance(value.get(key), str) for key in _KEYS) and (
            rows is None or (value["task"], value["id"]) in rows
        ):
            return True
        return any(_has_row(below, rows) for below in value.values())
    return isinstance(value, list) and any(_has_row(below, rows) for below in value)


def _read(store: Store, connection: Connection, digest: str) -> bytes | None:
    place = index.locate(connection, [digest]).get(digest)
    try:
        return None if place is None else store.packs.read(place)
    except Tampered:
        return None


def _doomed(
    store: Store,
    connection: Connection,
    wanted: list[AssetEntry],
    found: Deletion,
    progress: Progress | None,
) -> tuple[set[str], set[str]]:
    """The blobs of all that was ever deleted and that nothing else names, and all that something names.

    Those of ``wanted`` that stay are told.
    """
    doomed = blobs_of(connection, retirement.all_deleted(connection))
    step = (lambda done, total: progress("documents", done, total)) if progress else None
    needed = set(named_blobs(connection, given_up(connection, retirement.all_given_up(connection)), step))
    doomed -= needed
    if doomed & leases.held(connection, store.database.now(connection)):
        raise StateMoved("somebody is storing the same bytes at this moment; repeat the command later")
    for entry in wanted:
        if set(entry.record.files.values()) - doomed:
            found.kept.append(
                f"the rows of {entry.label}: {_namesakes(connection, entry)} has the same bytes"
            )
    return doomed, needed


def _namesakes(connection: Connection, entry: AssetEntry) -> str:
    """Other assets, not given up, with a file of ``entry``."""
    gone = retirement.all_given_up(connection)
    kinds = connection.scalars(select(asset_table.c.kind).distinct()).all()
    same = [
        f"{other.kind} {other.label}"
        for other in assets.listed(connection, kinds)
        if other.digest not in gone and set(other.record.files.values()) & set(entry.record.files.values())
    ]
    return ", ".join(same) or "a version"


def _updates_on(connection: Connection, data: set[str]) -> set[int]:
    """The numbers of the updates that read ``data``, as their own or as that of earlier tasks."""
    learned = learners(connection, data)
    found = [(entry.number, entry.as_(Update)) for entry in ledger.entries(connection, "update")]
    return {number for number, update in found if data & set(update.data) or update.parent in learned}


def _purge(
    store: Store, doomed: set[str], needed: set[str], found: Deletion, progress: Progress | None
) -> None:
    """Write every pack anew that holds one of ``doomed``: the index names only one place of each.

    Before that, whatever dead writers left: nobody can say what is in it, and nobody can finish it.
    """
    left = [name for name, _ in store.packs.leftovers()]
    dead = compaction.abandoned(store, left)
    for name in dead:
        store.packs.discard(name)
    for name in set(left) - set(dead):
        _keep(found, f"{name}: somebody writes this pack at this moment, and it may hold rows")
    named = partial(named_among, known=needed)
    names = list(store.packs.names()) if doomed else []
    for done, pack in enumerate(names, start=1):
        try:
            if not doomed.isdisjoint(location.digest for location in store.packs.entries(pack)):
                freed = compaction.repack(store, pack, named)
                if freed is None:
                    _keep(found, f"pack {pack}: somebody stores or uses the same bytes at this moment")
                else:
                    found.bytes += freed
                    found.packs += 1
        except Tampered as error:
            if pack in store.packs.names():  # else gc was first
                _keep(found, f"{error}; mend it (`meristem log verify` says more)")
        if progress:
            progress("packs", done, len(names))


def _keep(found: Deletion, why: str) -> None:
    found.kept.append(f"{why}; repeat the command")
    found.unfinished = True
