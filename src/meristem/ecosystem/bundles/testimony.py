"""The evidence of a bundle: events as the pushing workspace wrote them, and the documents that they speak of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import isfinite
from typing import Any

from meristem.ecosystem.bundles import form
from meristem.ecosystem.bundles.form import Bundle, is_digest, lines_of
from meristem.ecosystem.bundles.place import Place
from meristem.ecosystem.records import Asset, Evaluation, Model, Record, Version, parse_document, references
from meristem.errors import Tampered
from meristem.store import evidence
from meristem.store.canonical import canonical
from meristem.store.evidence import Event


def read_evidence(
    place: Place, manifest: Bundle, body: bytes, carried: set[str]
) -> tuple[list[Event], dict[str, dict[str, Any]]]:
    """The events in their order, and the documents beside them that they or their documents name."""
    where = f"{place.label}: {form.EVIDENCE}"
    events: list[Event] = []
    beside: dict[str, dict[str, Any]] = {}
    for digest, document in lines_of(where, body).items():
        if document.get("schema") == evidence.SCHEMA:
            if beside:
                raise Tampered(f"{where}: event {digest} stands among the documents")
            events.append(_event(where, digest, document))
        else:
            _beside(where, digest, document)
            beside[digest] = document
    for before, event in pairwise(events):
        follows = event.sequence == before.sequence + 1
        if event.sequence <= before.sequence or (follows and event.previous != before.hash):
            raise Tampered(f"{where}: event {event.sequence} does not follow event {before.sequence}")
    if not events or (events[-1].sequence, events[-1].hash) != (manifest.sequence, manifest.head):
        raise Tampered(f"{where}: it does not end with the event that {form.MANIFEST} names")
    known = carried | set(beside)
    if stranger := next((event for event in events if event.subject not in known), None):
        raise Tampered(f"{where}: event {stranger.sequence} is about {stranger.subject}, which is not here")
    told = {event.subject for event in events} | {str(event.data.get("result")) for event in events}
    told.update(*(references(document)[0] for document in beside.values()))
    if stray := sorted(set(beside) - told) or sorted(carried & set(beside)):
        raise Tampered(f"{where}: document {stray[0]} does not belong to it")
    return events, beside


def _event(where: str, digest: str, document: dict[str, Any]) -> Event:
    texts = ("previous", "kind", "actor", "time", "tool", "subject", "reason")
    sound = set(document) == {"schema", "sequence", "data", *texts}
    sound = sound and all(isinstance(document[key], str) for key in texts) and is_digest(document["subject"])
    if not (sound and isinstance(document["data"], dict) and type(document["sequence"]) is int):
        raise Tampered(f"{where}: {digest} is not an event")
    return Event.from_body(canonical(document))


def _beside(where: str, digest: str, document: dict[str, Any]) -> None:
    parse_document(document)  # raises BadInput for what a newer Meristem wrote
    if not all(is_digest(name) for names in references(document) for name in names):
        raise Tampered(f"{where}: document {digest} names something else than a digest")


def check_told(
    place: Place, manifest: Bundle, records: Mapping[str, Record | None], events: Iterable[Event]
) -> None:
    """Every model, version, asset and evaluation has the event that made it, and everything absent the one that
    gave it up."""
    where = f"{place.label}: {form.EVIDENCE}"
    told = {(event.kind, event.subject): event for event in events}
    for digest, record in records.items():
        if (expected := _made(record)) is None:
            continue
        kind, data = expected
        event = told.get((kind, digest))
        if event is None or any(event.data.get(key) != value for key, value in data.items()):
            raise Tampered(f"{where}: no event {kind} tells of {digest}")
        if isinstance(record, Evaluation) and not _is_time(event.data.get("seconds")):
            raise Tampered(f"{where}: event {event.sequence} does not say how long the evaluation took")
    made = told["version.created", manifest.version]
    if manifest.label != f"{made.data['model']}@v{made.data.get('number')}":
        raise Tampered(f"{place.label}: {form.MANIFEST}: the version is not called {manifest.label}")
    gone = {subject for kind, subject in told if kind in form.RETIREMENTS}
    if lost := sorted(set(manifest.absent) - gone):
        raise Tampered(f"{where}: no event says why {lost[0]} is absent")


def _made(record: Record | None) -> tuple[str, dict[str, Any]] | None:
    """The kind of the event that made ``record``, and what it must say."""
    if isinstance(record, Model):
        return "model.added", {"name": record.name, "tier": record.tier, "base": record.base}
    if isinstance(record, Version):
        return "version.created", {"model": record.model, "content": record.content}
    if isinstance(record, Asset):
        return "asset.added", {"kind": record.kind, "name": record.name}
    if isinstance(record, Evaluation):
        key = {"content": record.content, "suite": record.suite, "engine": record.engine}
        return "evaluation.recorded", {**key, "results": record.results}
    return None


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value) and value >= 0
