"""Writing a bundle. The workspace is only read: a push leaves no event, so the next one writes the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, select

from meristem.ecosystem import retirement
from meristem.ecosystem.bundles import form
from meristem.ecosystem.bundles.form import Bundle
from meristem.ecosystem.bundles.place import Place, place_at
from meristem.ecosystem.records import (
    Approval,
    BundleImport,
    Content,
    Decision,
    Model,
    Record,
    Release,
    UpdateOutcome,
    Version,
    parse_document,
    references,
)
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, StateMoved, Tampered
from meristem.store.canonical import PREFIX, canonical, digest_bytes
from meristem.store.evidence import Event
from meristem.store.index import locate
from meristem.store.pack_format import name_of
from meristem.store.packs import Blob, Location
from meristem.store.schema import documents as document_table
from meristem.store.schema import evaluations as evaluation_table
from meristem.store.schema import events as event_table
from meristem.store.schema import models as model_table
from meristem.store.schema import records as record_table
from meristem.store.store import Store, read_document

Progress = Callable[[int, int], None]
_LOOKUP = 500  # SQLite binds a limited number of variables per statement


@dataclass(frozen=True)
class Pushed:
    """What lies at the place now; ``digest`` is that of ``bundle.json``. ``written``: it was not there before."""

    version: VersionEntry
    digest: str
    documents: int
    packs: int
    written: bool


@dataclass(frozen=True)
class _Outline(Blob):
    """A blob whose bytes are not fetched: enough to know the name of its pack."""

    size: int = 0

    @property
    def length(self) -> int:
        return self.size


@dataclass(frozen=True)
class _Cargo:
    """A bundle before it is written: small files by name, and where the blobs of each pack lie in the store."""

    manifest: Bundle
    files: dict[str, bytes]
    packs: dict[str, list[Location]]


def push(store: Store, version: VersionEntry, where: str | Path, progress: Progress | None = None) -> Pushed:
    """Write ``version`` as a bundle; what lies there already, identical, is left as it is.

    Raises ``BadInput`` when its bytes were given up, or when the place holds another bundle or other files;
    ``StateMoved`` when another push writes another bundle there meanwhile; ``EnvironmentFailure`` when the place cannot
    be written; ``Tampered`` when the store's own bytes do not match.
    """
    with store.database.read() as connection:
        cargo = _gather(connection, version)
    place = place_at(where)
    there = place.names()
    _refuse_others(place, there, cargo)
    total = sum(location.length for lying in cargo.packs.values() for location in lying)
    done, written = 0, False
    for pack, lying in cargo.packs.items():
        written |= _write_pack(store, place, there, pack, lying, _from(progress, done, total))
        done += sum(location.length for location in lying)
    for name in (
        form.DOCUMENTS,
        form.EVIDENCE,
        form.MANIFEST,
    ):  # in this order: the manifest makes it a bundle
        written |= _write_file(place, name, cargo.files[name])
    manifest = cargo.manifest
    digest = digest_bytes(cargo.files[form.MANIFEST])
    return Pushed(version, digest, len(manifest.documents), len(manifest.packs), written)


def _refuse_others(place: Place, there: list[str], cargo: _Cargo) -> None:
    """Raises ``BadInput`` unless all that lies at the place is, byte for byte, a part of this bundle."""
    for name in (form.MANIFEST, form.DOCUMENTS, form.EVIDENCE):
        if name in there and place.read(name, form.LIMITS[name]) != cargo.files[name]:
            what = "another bundle" if form.MANIFEST in there else "an unfinished push of something else"
            raise BadInput(
                f"{place.label}: holds {what} ({name} differs); remove it or choose an empty place"
            )
    ours = {*cargo.files, *(_file_name(pack) for pack in cargo.packs)}
    if other := sorted(set(there) - ours):
        raise BadInput(f"{place.label}: holds {other[0]}, no part of this bundle; choose an empty place")


def _write_pack(
    store: Store, place: Place, there: list[str], pack: str, lying: list[Location], progress: Progress | None
) -> bool:
    if _file_name(pack) in there and _sound(place, pack):
        return False
    # In the order of the store's own packs, which is how they are read fastest.
    digests = [found.digest for found in sorted(lying, key=lambda location: (location.pack, location.offset))]
    place.packs.write(
        [Blob(found.digest, view, found.dtype, found.shape) for found, view in store.views(digests)], progress
    )
    return True


def _sound(place: Place, pack: str) -> bool:
    try:
        for _ in place.packs.views(place.packs.entries(pack)):
            pass
    except Tampered:
        return False
    return True


def _write_file(place: Place, name: str, body: bytes) -> bool:
    made = place.create(name, body)
    if place.read(name, form.LIMITS[name]) != body:
        raise StateMoved(
            f"{place.label}: another push wrote its {name} there meanwhile; choose another place"
        )
    return made


def _file_name(pack: str) -> str:
    return f"{form.PACKS}/{pack.removeprefix(PREFIX)}.safetensors"


def _from(progress: Progress | None, done: int, total: int) -> Progress | None:
    """``progress`` of one pack as progress of all."""
    return (lambda now, _: progress(done + now, total)) if progress else None


def _gather(connection: Connection, version: VersionEntry) -> _Cargo:
    bodies: dict[str, dict[str, Any]] = {}

    def read(digest: str) -> dict[str, Any]:
        if digest not in bodies:
            bodies[digest] = read_document(connection, digest)
        return bodies[digest]

    retirement.refuse(connection, version.digest)
    lineage = form.ordered([version.digest], read)
    records = {digest: parse_document(read(digest)) for digest in lineage}
    own = {digest: record for digest, record in records.items() if isinstance(record, Version)}
    models = _model_documents(connection, {record.model for record in own.values()}, read)
    evaluations = _evaluations(connection, [d for d, r in records.items() if isinstance(r, Content)])
    beside = _beside(connection, own, read)
    reports = [read(d)["report"] for d in beside if read(d)["schema"] == BundleImport.SCHEMA]
    order = form.ordered([*models, version.digest, *evaluations, *sorted(reports)], read)
    records = {digest: parse_document(read(digest)) for digest in order}
    absent = sorted(retirement.all_given_up(connection) & set(order))
    packs = _packs(connection, records, absent)
    evidence_documents = sorted(beside - set(order))
    events = _events(connection, {*order, *evidence_documents})
    newest = Event.from_body(events[-1])
    files = {
        form.DOCUMENTS: form.joined(canonical(read(digest)) for digest in order),
        form.EVIDENCE: form.joined([*events, *(canonical(read(digest)) for digest in evidence_documents)]),
    }
    manifest = Bundle(
        version=version.digest,
        label=version.label,
        documents=order,
        absent=absent,
        packs=list(packs),
        files={name: digest_bytes(body) for name, body in files.items()},
        sequence=newest.sequence,
        head=newest.hash,
    )
    files[form.MANIFEST] = form.joined([canonical(manifest.document())])
    for name, body in files.items():
        if len(body) > form.LIMITS[name]:
            raise BadInput(
                f"{version.label}: its {name} takes {len(body) >> 20} MiB, more than a bundle carries"
            )
    return _Cargo(manifest, files, packs)


def _model_documents(
    connection: Connection, names: set[str], read: Callable[[str], dict[str, Any]]
) -> list[str]:
    """The models of these names and those that they stand on, bases first."""
    found: list[str] = []

    def visit(name: str) -> None:
        digest = connection.scalar(select(model_table.c.document).where(model_table.c.name == name))
        if digest is None:
            raise Tampered(f"model {name} is missing; `meristem log verify` lists what else is")
        if digest not in found:
            if base := Model.from_document(read(digest)).base:
                visit(base)
            found.append(digest)

    for name in sorted(names):
        visit(name)
    return found


def _evaluations(connection: Connection, contents: list[str]) -> list[str]:
    column = evaluation_table.c.content
    return sorted(_looked_up(connection, evaluation_table.c.document, column, contents))


def _beside(
    connection: Connection, own: dict[str, Version], read: Callable[[str], dict[str, Any]]
) -> set[str]:
    """Documents that tell about the versions ``own``: decisions and what they rest on, approvals, releases, the
    updates that made them, and the bundles that they came from."""
    found: set[str] = set()
    for model in {record.model for record in own.values()}:
        for row in connection.execute(select(record_table).where(record_table.c.model == model)):
            record = parse_document(read(row.document))
            outcome = parse_document(read(row.result)) if row.kind == "update" and row.result else None
            if isinstance(outcome, UpdateOutcome) and outcome.version in own:
                found |= {row.document, row.result}
            if isinstance(record, Decision | Release) and record.version in own:
                found.add(row.document)
    decisions = {digest for digest in found if read(digest)["schema"] == Decision.SCHEMA}
    for digest in decisions:
        found |= references(read(digest))[0]
    imports = select(document_table.c.digest).where(document_table.c.schema == BundleImport.SCHEMA)
    found |= {digest for digest in connection.scalars(imports) if read(digest)["version"] in own}
    approvals = select(record_table.c.document).where(record_table.c.kind == "approval")
    for digest in connection.scalars(approvals):
        if Approval.from_document(read(digest)).decision in decisions:
            found.add(digest)
    return found


def _packs(
    connection: Connection, records: dict[str, Record | None], absent: list[str]
) -> dict[str, list[Location]]:
    """The packs of the bundle by name, with where the blobs of each lie in the store.

    In the order of their digests they fill packs of a bounded size: the same blobs make the same packs everywhere.
    """
    named = form.blobs(records, absent)
    found = locate(connection, named)
    if missing := sorted(named.keys() - found.keys()):
        raise Tampered(f"blob {missing[0]} is not stored; `meristem log verify` lists what else is missing")
    groups = grouped(found[digest] for digest in sorted(found))
    return {
        name_of(_Outline(x.digest, b"", x.dtype, x.shape, x.length) for x in group): group for group in groups
    }


def grouped(locations: Iterable[Location]) -> Iterator[list[Location]]:
    """Lists of locations that fit into memory together (or a single one that does not)."""
    group: list[Location] = []
    size = 0
    for location in locations:
        if group and size + location.length > form.AT_ONCE:
            yield group
            group, size = [], 0
        group.append(location)
        size += location.length
    if group:
        yield group


def _events(connection: Connection, subjects: set[str]) -> list[bytes]:
    """The bytes of every event about one of ``subjects``, oldest first."""
    rows: dict[int, bytes] = {}
    names = sorted(subjects)
    for start in range(0, len(names), _LOOKUP):
        query = select(event_table.c.sequence, event_table.c.body)
        for row in connection.execute(query.where(event_table.c.subject.in_(names[start : start + _LOOKUP]))):
            rows[row.sequence] = row.body
    return [rows[sequence] for sequence in sorted(rows)]


def _looked_up(
    connection: Connection, wanted: ColumnElement[Any], column: ColumnElement[Any], names: list[str]
) -> Iterator[str]:
    for start in range(0, len(names), _LOOKUP):
        yield from connection.scalars(select(wanted).where(column.in_(names[start : start + _LOOKUP])))
