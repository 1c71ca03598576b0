"""Taking a bundle into a workspace: everything is checked first, then bytes are stored, then one transaction names them.

What the other workspace recorded stays apart: its events are kept verbatim in a ``report`` asset and are no part of
the chain here, which says only what arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, insert, select

from meristem.data.datasets import ROWS_FILE
from meristem.ecosystem import aliases, assets, deletion, retirement, versions
from meristem.ecosystem.bundles import form
from meristem.ecosystem.bundles.push import grouped
from meristem.ecosystem.bundles.read import Arrival, read_bundle
from meristem.ecosystem.records import Asset, BundleImport, Content, Evaluation, Model, Record, Version
from meristem.ecosystem.retirement import DELETED
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, EnvironmentFailure, StateMoved
from meristem.store import leases
from meristem.store.canonical import digest_bytes, short
from meristem.store.index import locate
from meristem.store.packs import Blob
from meristem.store.schema import documents as document_table
from meristem.store.schema import evaluations as evaluation_table
from meristem.store.schema import events as event_table
from meristem.store.schema import models as model_table
from meristem.store.schema import versions as version_table
from meristem.store.store import Store, Stored, Transaction, read_document

Progress = Callable[[str, int, int], None]  # what, done, total
Inspect = Callable[[Record, Callable[[str], bytes]], None]
_LOOKUP = 500  # SQLite binds a limited number of variables per statement


@dataclass(frozen=True)
class Pulled:
    """The version as it is called here. ``added``: it was not here before; ``changed``: something was recorded."""

    version: VersionEntry
    bundle: str
    label: str  # as the other workspace calls it
    added: bool
    changed: bool


def pull(
    store: Store,
    actor: str,
    where: str | Path,
    *,
    inspect: Inspect | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Add the version of the bundle at ``where``; the same bundle again changes nothing.

    ``inspect(record, read)`` may refuse a data set or an evaluation that would be new here, by raising ``BadInput``.
    Raises what ``read_bundle`` does, and ``BadInput`` when the models here do not fit; then nothing is changed.
    """
    arrival = read_bundle(where, _named(progress, "check"))
    with store.database.read() as connection:
        if found := _known(connection, arrival):
            return found
        _check_fit(connection, actor, arrival)
        away, known = _away(connection, arrival), _present(connection, arrival.documents)
        skipped = _measured_here(connection, arrival) - known
    for digest, record in arrival.records.items():
        if inspect and isinstance(record, Asset | Evaluation) and digest not in known | away | skipped:
            inspect(record, arrival.read)
    taken = {digest: record for digest, record in arrival.records.items() if digest not in skipped}
    reason = f"{arrival.manifest.label} came in bundle {short(arrival.digest)}"
    with (
        _stored(store, arrival, form.blobs(taken, away), _named(progress, "store")) as held,
        store.transaction(actor, reason) as tx,
    ):
        for stored in held:
            tx.add_blobs(stored)
        if found := _known(tx.connection, arrival):  # by another process meanwhile
            return found
        _check_fit(tx.connection, actor, arrival)
        return _add(tx, arrival)


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return (lambda done, total: progress(what, done, total)) if progress else None


def _known(connection: Connection, arrival: Arrival) -> Pulled | None:
    """What is to be said of a bundle that was taken in before, or that was pushed from here."""
    ours = select(event_table.c.sequence).where(event_table.c.hash == arrival.manifest.head)
    if not (_present(connection, [_import(arrival).digest]) or connection.scalar(ours)):
        return None
    if (set(arrival.documents) - {*arrival.each(Model), *arrival.each(Evaluation)}) - _present(
        connection, arrival.documents
    ):
        return None
    if _restorable(connection, arrival):
        return None
    entry = versions.by_digest(connection, arrival.manifest.version)
    return Pulled(entry, arrival.digest, arrival.manifest.label, False, False)


def _check_fit(connection: Connection, actor: str, arrival: Arrival) -> None:
    """Raises ``BadInput`` unless each model is new, or here with the same tier and base."""
    for model in arrival.each(Model).values():
        here = _model_here(connection, model.name)
        if here is not None and (here.tier, here.base) != (model.tier, model.base):
            raise BadInput(
                f"model {model.name} is {_kind(here)} here and {_kind(model)} in the bundle: they are different lines; "
                "pull it into another workspace"
            )
    version = arrival.version
    if _model_here(connection, version.model) and not _version_here(connection, arrival.manifest.version):
        aliases.check_actor(connection, version.model, aliases.CHALLENGER, actor)


def _model_here(connection: Connection, name: str) -> Model | None:
    digest = connection.scalar(select(model_table.c.document).where(model_table.c.name == name))
    return Model.from_document(read_document(connection, digest)) if digest else None


def _kind(model: Model) -> str:
    return f"of tier {model.tier} " + (f"on {model.base}" if model.base else "with no base")


def _version_here(connection: Connection, digest: str) -> bool:
    query = select(version_table.c.number).where(version_table.c.digest == digest)
    return connection.scalar(query) is not None


def _measured_here(connection: Connection, arrival: Arrival) -> set[str]:
    """Evaluations that were made here already, perhaps with another outcome: the ones that are here stay."""
    table, found = evaluation_table.c, set()
    for digest, record in arrival.each(Evaluation).items():
        same = (table.content == record.content) & (table.suite == record.suite)
        if connection.scalar(select(table.document).where(same & (table.engine == record.engine))):
            found.add(digest)
    return found


def _present(connection: Connection, digests: Iterable[str]) -> set[str]:
    names, found = list(digests), set()
    for start in range(0, len(names), _LOOKUP):
        query = select(document_table.c.digest)
        found |= set(
            connection.scalars(query.where(document_table.c.digest.in_(names[start : start + _LOOKUP])))
        )
    return found


def _away(connection: Connection, arrival: Arrival) -> set[str]:
    """Versions and assets whose bytes are not taken in: absent in the bundle, or deleted here for good.

    Rows that were deleted on a request do not come back under another name either, nor in a method state.
    """
    deleted = retirement.all_deleted(connection)
    gone = [Asset.from_document(read_document(connection, digest)) for digest in deleted]
    files = {file for asset in gone for file in asset.files.values()}
    again = {
        digest
        for digest, asset in arrival.each(Asset).items()
        if digest in deleted or files & set(asset.files.values())
    }
    return again | _states_with_rows(arrival, again) | set(arrival.manifest.absent)


def _states_with_rows(arrival: Arrival, away: set[str]) -> set[str]:
    """The method states of a bundle that hold rows of its data sets ``away``; any rows, if these cannot be read."""
    found = arrival.each(Asset)
    data = [found[digest] for digest in sorted(away) if found[digest].kind == "dataset"]
    if not data:
        return set()
    rows = deletion.rows_in(_body(arrival, asset.files.get(ROWS_FILE, "")) for asset in data)
    return {
        digest
        for digest, asset in found.items()
        if asset.kind == deletion.METHOD_STATE
        and digest not in arrival.manifest.absent
        and deletion.hold_rows((_body(arrival, file) for file in asset.files.values()), rows)
    }


def _body(arrival: Arrival, digest: str) -> bytes | None:
    return arrival.read(digest) if digest in arrival.places else None


def _restorable(connection: Connection, arrival: Arrival) -> set[str]:
    """What was given up here by a retention rule and comes with its bytes."""
    away = _away(connection, arrival)
    return (retirement.all_given_up(connection) & set(arrival.documents)) - away


@contextmanager
def _stored(
    store: Store, arrival: Arrival, wanted: Collection[str], progress: Callable[[int, int], None] | None
) -> Iterator[list[Stored]]:
    """The blobs ``wanted`` and the report's files in the store, leased: for the transaction that names them."""
    held: list[Stored] = []
    try:
        with store.database.write() as connection:
            missing = sorted(set(wanted) - locate(connection, wanted).keys())
            expires = store.database.now(connection) + store.lease_seconds
            held.append(Stored(leases.take(connection, wanted, expires)))
        places = sorted((arrival.places[digest] for digest in missing), key=lambda x: (x.pack, x.offset))
        done, total = 0, sum(place.length for place in places)
        for group in grouped(places):
            _renew(store, held)
            blobs = [Blob(x.digest, view, x.dtype, x.shape) for x, view in arrival.packs.views(group)]
            held.append(store.put(blobs))
            done += sum(place.length for place in group)
            if progress:
                progress(done, total)
        _renew(store, held)
        held.append(store.put([Blob.file(body) for body in _kept_files(arrival).values()]))
        yield held
    except BaseException:
        with suppress(EnvironmentFailure, StateMoved), store.database.write() as connection:
            for stored in held:
                leases.end(connection, stored.lease or "")
        raise


def _renew(store: Store, held: list[Stored]) -> None:
    """Keep the leases on what was stored before, while more is."""
    with store.database.write() as connection:
        now = store.database.now(connection)
        for stored in held:
            if stored.lease:
                leases.renew(connection, stored.lease, now, now + store.lease_seconds)


def _kept_files(arrival: Arrival) -> dict[str, bytes]:
    return {name: arrival.files[name] for name in (form.MANIFEST, form.EVIDENCE)}


def _report(arrival: Arrival) -> Asset:
    return Asset(
        kind="report",
        name=arrival.version.model,
        files={name: digest_bytes(body) for name, body in _kept_files(arrival).items()},
        facts={"about": arrival.manifest.version, "bundle": arrival.digest},
    )


def _import(arrival: Arrival) -> BundleImport:
    report = _report(arrival)
    return BundleImport(
        bundle=arrival.digest,
        version=arrival.manifest.version,
        report=report.digest,
        evidence=report.files[form.EVIDENCE],
        head=arrival.manifest.head,
        sequence=arrival.manifest.sequence,
    )


def _add(tx: Transaction, arrival: Arrival) -> Pulled:
    """Everything that is new here, with the events that say so."""
    manifest = arrival.manifest
    away, restorable = _away(tx.connection, arrival), _restorable(tx.connection, arrival)
    known, measured = _present(tx.connection, arrival.documents), _measured_here(tx.connection, arrival)
    was_here = _version_here(tx.connection, manifest.version)
    new_models = []
    for digest, record in arrival.records.items():
        if isinstance(record, Model):
            if _model_here(tx.connection, record.name) is None:
                _add_model(tx, record)
                new_models.append(record.name)
        elif digest not in (known - restorable) | measured:
            _add_record(tx, arrival, digest, record, away)
    for digest in sorted(away - known):
        _give_up(tx, arrival, digest)
    _point(tx, arrival, new_models, was_here)
    imported = _import(arrival)
    if not _present(tx.connection, [imported.digest]):
        assets.add(tx, _report(arrival))
        subject = tx.add_document(imported.document())
        tx.append("bundle.imported", subject, bundle=arrival.digest, version=manifest.version)
    entry = versions.by_digest(tx.connection, manifest.version)
    return Pulled(entry, arrival.digest, manifest.label, not was_here, True)


def _add_model(tx: Transaction, model: Model) -> None:
    digest = tx.add_document(model.document())
    row = {"name": model.name, "tier": model.tier, "base": model.base}
    tx.connection.execute(insert(model_table).values(**row, document=digest))
    tx.append("model.added", digest, **row)


def _add_record(
    tx: Transaction, arrival: Arrival, digest: str, record: Record | None, away: set[str]
) -> None:
    """A document with its row; a version or an asset that had been given up here is there again."""
    if isinstance(record, Version):
        versions.create(tx, arrival.one(Content, record.content), record)
    elif isinstance(record, Asset):
        if digest not in away:
            assets.add(tx, record)
        else:  # given up at once
            assets.register(tx, record)
    elif isinstance(record, Evaluation):
        _add_evaluation(tx, arrival, digest, record)
    else:
        tx.add_document(arrival.documents[digest])


def _add_evaluation(tx: Transaction, arrival: Arrival, digest: str, record: Evaluation) -> None:
    key = {"content": record.content, "suite": record.suite, "engine": record.engine}
    seconds = arrival.seconds[digest]
    tx.add_document(record.document())
    tx.connection.execute(insert(evaluation_table).values(**key, document=digest, seconds=seconds))
    tx.append("evaluation.recorded", digest, **key, results=record.results, seconds=seconds)


def _give_up(tx: Transaction, arrival: Arrival, digest: str) -> None:
    """Record that a version or an asset came without its bytes."""
    record = arrival.records[digest]
    why = [event for event in arrival.events if event.subject == digest and event.kind in form.RETIREMENTS]
    verb = why[-1].kind.partition(".")[2] if why else DELETED
    reason = f"absent in bundle {short(arrival.digest)}" if why else "its rows were deleted here before"
    if isinstance(record, Version):
        entry, content = versions.by_digest(tx.connection, digest), arrival.one(Content, record.content)
        retirement.give_up(tx, "version", digest, verb, reason, label=entry.label, kind=content.kind)
    elif isinstance(record, Asset):
        label = assets.register(tx, record).label
        retirement.give_up(tx, "asset", digest, verb, reason, label=label, kind=record.kind)


def _point(tx: Transaction, arrival: Arrival, new_models: list[str], was_here: bool) -> None:
    """The champion of each new model: the version nearest to the one that came. Elsewhere it is the challenger."""
    nearest: dict[str, str] = {}
    queue = [arrival.manifest.version]
    seen = set(queue)
    for digest in queue:
        version = arrival.one(Version, digest)
        nearest.setdefault(version.model, digest)
        below = [
            name for name in dict.fromkeys([version.base, *version.parents]) if name and name not in seen
        ]
        seen.update(below)
        queue += below
    for name in new_models:
        aliases.move(tx, name, aliases.CHAMPION, nearest[name], expected_revision=0)
    model = arrival.version.model
    if not was_here and model not in new_models:
        aliases.point(tx, model, aliases.CHALLENGER, arrival.manifest.version)
