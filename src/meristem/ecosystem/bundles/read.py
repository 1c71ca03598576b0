"""Reading a bundle: nothing of it is believed before everything was checked, and nothing is written here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from meristem.ecosystem.bundles import form
from meristem.ecosystem.bundles.documents import check_shape, read_documents
from meristem.ecosystem.bundles.form import Bundle, document_of, is_digest
from meristem.ecosystem.bundles.place import Place, place_at
from meristem.ecosystem.bundles.testimony import check_told, read_evidence
from meristem.ecosystem.records import (
    Record,
    Version,
)
from meristem.errors import BadInput, Tampered
from meristem.store.canonical import digest_bytes
from meristem.store.evidence import Event
from meristem.store.pack_format import is_pack_name
from meristem.store.packs import Location, Packs

Progress = Callable[[int, int], None]
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Arrival:
    """A bundle whose every byte was checked. ``records`` are in an order in which each names only earlier ones."""

    digest: str
    manifest: Bundle
    files: dict[str, bytes]
    documents: dict[str, dict[str, Any]]
    records: dict[str, Record | None]
    places: dict[str, Location]
    packs: Packs
    events: list[Event]

    def each(self, kind: type[R]) -> dict[str, R]:
        return {digest: record for digest, record in self.records.items() if isinstance(record, kind)}

    def one(self, kind: type[R], digest: str) -> R:
        found = self.records[digest]
        assert isinstance(found, kind)
        return found

    @property
    def version(self) -> Version:
        return self.one(Version, self.manifest.version)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """How long each evaluation took."""
        return {e.subject: e.data["seconds"] for e in self.events if e.kind == "evaluation.recorded"}

    def read(self, digest: str) -> bytes:
        """The bytes of a blob, checked once more."""
        return self.packs.read(self.places[digest])


def read_bundle(where: Any, progress: Progress | None = None) -> Arrival:
    """Everything that lies at ``where``, checked.

    Raises ``BadInput`` when it is no bundle or one that only a newer Meristem reads, ``Tampered`` naming the file or
    the digest that is wrong, ``EnvironmentFailure`` when the place cannot be read.
    """
    place = place_at(where)
    files = {form.MANIFEST: _file(place, form.MANIFEST)}
    manifest = _manifest(place, files[form.MANIFEST])
    for name in (form.DOCUMENTS, form.EVIDENCE):
        files[name] = _file(place, name)
        if digest_bytes(files[name]) != manifest.files[name]:
            raise Tampered(f"{place.label}: {name} is not the file that {form.MANIFEST} names")
    documents, records = read_documents(place, manifest, files[form.DOCUMENTS])
    events, beside = read_evidence(place, manifest, files[form.EVIDENCE], set(documents))
    check_shape(place, manifest, documents, records, beside)
    check_told(place, manifest, records, events)
    places = _check_packs(place, manifest, records, progress)
    digest = digest_bytes(files[form.MANIFEST])
    return Arrival(digest, manifest, files, documents, records, places, place.packs, events)


def _file(place: Place, name: str) -> bytes:
    body = place.read(name, form.LIMITS[name])
    if body is not None:
        return body
    if name == form.MANIFEST:
        raise BadInput(
            f"{place.label}: no {name} here: not a bundle, or one whose push was cut off; push it again"
        )
    raise Tampered(f"{place.label}: {name} is missing")


def _manifest(place: Place, body: bytes) -> Bundle:
    found = document_of(f"{place.label}: {form.MANIFEST}", body.removesuffix(b"\n"))
    schema = found.get("schema")
    if isinstance(schema, str) and schema.startswith("meristem/bundle/") and schema != Bundle.SCHEMA:
        raise BadInput(f"{place.label}: a bundle of schema {schema}; use a Meristem that reads it")
    try:
        manifest = Bundle.from_document(found)
    except BadInput as error:
        raise Tampered(f"{place.label}: {form.MANIFEST}: {error}") from error
    digests = [
        manifest.version,
        manifest.head,
        *manifest.documents,
        *manifest.absent,
        *manifest.files.values(),
    ]
    if (
        not body.endswith(b"\n")
        or not all(map(is_digest, digests))
        or not all(map(is_pack_name, manifest.packs))
        or set(manifest.files) != {form.DOCUMENTS, form.EVIDENCE}
        or manifest.absent != sorted(set(manifest.absent))
        or len(set(manifest.packs)) != len(manifest.packs)
    ):
        raise Tampered(f"{place.label}: {form.MANIFEST} does not describe a bundle")
    return manifest


def _check_packs(
    place: Place, manifest: Bundle, records: Mapping[str, Record | None], progress: Progress | None
) -> dict[str, Location]:
    """Where each blob lies, every byte of every pack read and checked."""
    wanted = form.blobs(records, manifest.absent)
    found: dict[str, Location] = {}
    for pack in manifest.packs:
        for location in place.packs.entries(pack):
            if found.setdefault(location.digest, location) is not location or location.digest not in wanted:
                raise Tampered(
                    f"{place.label}: pack {pack} holds {location.digest}, which does not belong there"
                )
    for digest, kinds in wanted.items():
        if digest not in found:
            raise Tampered(f"{place.label}: no pack holds the blob {digest}")
        if kinds != {"file" if found[digest].dtype is None else "tensor"}:
            raise Tampered(f"{place.label}: {digest} is stored as something else than it is named as")
    total, done = sum(location.length for location in found.values()), 0
    for location, _ in place.packs.views(found.values()):
        done += location.length
        if progress:
            progress(done, total)
    return found
