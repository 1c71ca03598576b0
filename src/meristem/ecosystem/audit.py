"""``log verify``: recompute everything that the evidence promises and name what does not match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, LargeBinary, Row, cast, func, select

from meristem.ecosystem.records import references
from meristem.errors import BadInput, EnvironmentFailure, Tampered
from meristem.store import evidence
from meristem.store.canonical import digest_bytes, parse
from meristem.store.packs import Location
from meristem.store.schema import (
    alias_moves,
    aliases,
    assets,
    blobs,
    documents,
    evaluations,
    events,
    models,
    records,
)
from meristem.store.schema import versions as version_table
from meristem.store.store import Store, location_of

Progress = Callable[[str, int, int], None]


@dataclass
class Audit:
    """What was checked, what is wrong (one line each), and the head to keep outside the workspace."""

    events: int = 0
    documents: int = 0
    blobs: int = 0
    head: str = evidence.GENESIS
    problems: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        return not self.problems


@dataclass
class _Expected:
    """The index tables as the events alone imply them."""

    subjects: set[str] = field(default_factory=set)
    models: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    versions: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    assets: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    records: dict[tuple[str, int], tuple[Any, ...]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], tuple[Any, ...]] = field(default_factory=dict)
    moves: dict[tuple[str, str, int], tuple[Any, ...]] = field(default_factory=dict)
    evaluations: dict[tuple[str, str, str], tuple[Any, ...]] = field(default_factory=dict)


def verify(store: Store, progress: Progress | None = None, expected_head: str | None = None) -> Audit:
    """Check the chain, every document, every blob and every pointer of the workspace.

    ``expected_head`` is a hash kept elsewhere: it must stand in the chain, which catches a cut tail and a
    recomputed chain.
    """
    audit = Audit()
    with store.database.read() as connection:
        expected = _walk_chain(connection, audit, progress)
        if expected_head is not None:
            known = connection.scalar(select(events.c.sequence).where(events.c.hash == expected_head))
            if known is None and expected_head != evidence.GENESIS:
                audit.problems.append(f"the chain does not contain the head {expected_head} kept outside")
        _check_indexes(connection, expected, audit)
        named = _check_documents(connection, expected, audit)
        locations = _locations(connection, named, audit)
    _check_packs(store, sorted({location.pack for location in locations}), audit)
    _check_blobs(store, locations, audit, progress)
    return audit


def _walk_chain(connection: Connection, audit: Audit, progress: Progress | None) -> _Expected:
    expected = _Expected()
    total = connection.scalar(select(func.count()).select_from(events)) or 0
    for sequence, event, problem in evidence.check_chain(connection):
        audit.events += 1
        if problem:
            audit.problems.append(f"event {sequence}: {problem}")
        if event is not None:
            try:
                _fold(expected, event)
            except (KeyError, TypeError, AttributeError) as error:
                audit.problems.append(f"event {sequence}: its data do not say what happened ({error!r})")
        if progress and audit.events % 256 == 0:
            progress("events", audit.events, total)
    audit.head = evidence.head(connection)[1]
    return expected


def _fold(expected: _Expected, event: evidence.Event) -> None:
    data, subject = event.data, event.subject
    expected.subjects.add(subject)
    noun, _, verb = event.kind.partition(".")
    if event.kind == "model.added":
        expected.models[data["name"]] = (data["tier"], data["base"], subject)
    elif event.kind == "version.created":
        expected.versions[subject] = (data["model"], data["number"], data["content"])
    elif event.kind == "asset.added":
        expected.assets[subject] = (data["kind"], data["name"], data["number"])
    elif event.kind == "alias.moved":
        key = (data["model"], data["alias"])
        expected.aliases[key] = (subject, data["revision"])
        expected.moves[(*key, data["revision"])] = (subject, data["previous"], event.sequence)
    elif event.kind == "evaluation.recorded":
        expected.evaluations[(data["content"], data["suite"], data["engine"])] = (subject, data["seconds"])
    elif verb == "opened":
        expected.records[(noun, data["number"])] = (data["model"], subject, data["status"], None)
    elif (noun, data.get("number")) in expected.records:
        model, document, _, result = expected.records[(noun, data["number"])]
        expected.records[(noun, data["number"])] = (model, document, verb, data.get("result") or result)


def _check_documents(connection: Connection, expected: _Expected, audit: Audit) -> dict[str, str]:
    """Every document, and every document that an event or another document names. Returns the blobs named."""
    found: set[str] = set()
    wanted = dict.fromkeys(expected.subjects, "an event")
    named: dict[str, str] = {}
    body = cast(documents.c.body, LargeBinary).label("body")  # whatever type somebody gave it
    for row in connection.execute(select(documents.c.digest, documents.c.schema, body)):
        audit.documents += 1
        found.add(row.digest)
        try:
            below, blobs_below = _references(row)
        except (ValueError, TypeError, RecursionError, BadInput) as error:
            audit.problems.append(f"document {row.digest} ({row.schema}): {error}")
            continue
        wanted |= dict.fromkeys(below, f"document {row.digest}")
        named |= dict.fromkeys(blobs_below, f"document {row.digest}")
    for missing in sorted(wanted.keys() - found, key=str):
        audit.problems.append(f"document {missing}: named by {wanted[missing]} but missing")
    return named


def _references(row: Row) -> tuple[set[str], set[str]]:
    if digest_bytes(row.body) != row.digest:
        raise ValueError("its bytes do not match its digest")
    document = parse(row.body)
    if not isinstance(document, dict) or document.get("schema") != row.schema:
        raise ValueError("its schema column does not match its bytes")
    below, blobs_below = references(document)
    odd = next((name for name in (*below, *blobs_below) if not isinstance(name, str)), None)
    if odd is not None:
        raise ValueError(f"it names {odd!r} where a digest belongs")
    return below, blobs_below


def _check_indexes(connection: Connection, expected: _Expected, audit: Audit) -> None:
    def rows(query: Any) -> list[Any]:
        return list(connection.execute(query))

    actual: dict[str, dict[Any, Any]] = {
        "model": {r.name: (r.tier, r.base, r.document) for r in rows(select(models))},
        "version": {r.digest: (r.model, r.number, r.content) for r in rows(select(version_table))},
        "asset": {r.digest: (r.kind, r.name, r.number) for r in rows(select(assets))},
        "alias": {(r.model, r.alias): (r.version, r.revision) for r in rows(select(aliases))},
        "alias move": {
            (r.model, r.alias, r.revision): (r.version, r.previous, r.event)
            for r in rows(select(alias_moves))
        },
        "record": {
            (r.kind, r.number): (r.model, r.document, r.status, r.result) for r in rows(select(records))
        },
        "evaluation": {
            (r.content, r.suite, r.engine): (r.document, r.seconds) for r in rows(select(evaluations))
        },
    }
    promised: dict[str, dict[Any, Any]] = {
        "model": expected.models,
        "version": expected.versions,
        "asset": expected.assets,
        "alias": expected.aliases,
        "alias move": expected.moves,
        "record": expected.records,
        "evaluation": expected.evaluations,
    }
    for what, table in promised.items():
        for key in sorted(set(table) | set(actual[what]), key=str):
            if table.get(key) != actual[what].get(key):
                name = " ".join(map(str, key)) if isinstance(key, tuple) else key
                audit.problems.append(f"{what} {name}: the table does not match the evidence")


def _locations(connection: Connection, named: dict[str, str], audit: Audit) -> list[Location]:
    """The blob index; every blob that a document names must have a place in a pack."""
    known, locations = set(), []
    for row in connection.execute(select(blobs).order_by(blobs.c.pack, blobs.c.offset)):
        known.add(row.digest)
        try:
            locations.append(location_of(row))
        except Tampered as error:
            audit.problems.append(str(error))
    for missing in sorted(named.keys() - known, key=str):
        audit.problems.append(f"blob {missing}: named by {named[missing]} but not stored")
    return locations


def _check_packs(store: Store, packs: list[str], audit: Audit) -> None:
    """The headers, from which the index can be rebuilt."""
    for pack in packs:
        try:
            for _ in store.packs.entries(pack):
                pass
        except (Tampered, EnvironmentFailure) as error:
            audit.problems.append(f"pack {pack}: {error}")


def _check_blobs(store: Store, locations: list[Location], audit: Audit, progress: Progress | None) -> None:
    for location in locations:
        audit.blobs += 1
        try:
            store.packs.read(location)
        except (Tampered, EnvironmentFailure) as error:
            audit.problems.append(str(error))
        if progress and (audit.blobs % 64 == 0 or audit.blobs == len(locations)):
            progress("blobs", audit.blobs, len(locations))
