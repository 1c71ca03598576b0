"""What reaches what: which documents work still needs, and which blobs must stay for them.

Everything that any document names stays, unless the version or asset that it belongs to was given up (see
``retirement``). Retention may give up only what nothing ``in_use`` reaches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

from sqlalchemy import Connection, func, select

from meristem.ecosystem import aliases as alias_room
from meristem.ecosystem.records import Asset, Content, Evaluation, Version, blob_schemas, references
from meristem.ecosystem.retirement import DELETED, RETIRED, all_given_up
from meristem.errors import Tampered
from meristem.store.canonical import digest_bytes, parse
from meristem.store.database import stream
from meristem.store.schema import alias_moves, aliases, assets, blobs, documents, events, records, versions

GIVING_UP = tuple(f"{noun}.{verb}" for noun in ("version", "asset") for verb in (RETIRED, DELETED))
FINISHED = ("done", "closed")  # updates that nobody will go on with
_LOOKUP = 500  # SQLite binds a limited number of variables per statement


class Reach:
    """What the documents of one snapshot reach. Raises ``Tampered`` where a document is missing or altered."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self._suites = _suites(connection)

    def closure(self, roots: Iterable[str]) -> set[str]:
        """``roots`` and every document below them."""
        found: set[str] = set()
        queue = list(roots)
        while queue:
            digest = queue.pop()
            if digest not in found:
                found.add(digest)
                queue.extend(self._below(digest) - found)
        return found

    def in_use(self) -> set[str]:
        """Every document that work can still come to, so that no rule may give it up.

        That is all below: versions that an alias points at, that were champion or stand in a release (somebody
        may roll back to them); updates, plans and signals that are open; passed decisions whose champion has not
        moved, so that they can still be promoted; the newest of each suite, which judges what comes next; and the
        suites behind every decision ever made, so that its verdict can be explained.
        """
        connection = self.connection
        roots = set(connection.scalars(select(aliases.c.version)))
        champions = select(alias_moves.c.version).where(alias_moves.c.alias == alias_room.CHAMPION)
        roots |= set(connection.scalars(champions))
        roots |= self._newest_suites() | self._open_records()
        for row in connection.execute(_records("release")).all():
            release = read(connection, row.document)
            roots |= {release["version"], release["previous"]}
        for row in connection.execute(_records("decision")).all():
            decision = read(connection, row.document)
            if row.status == "pass" and self._stands(decision):
                roots.add(row.document)
            for evaluation in decision["evaluations"]:
                roots |= self._suite_of(read(connection, evaluation))
        return self.closure(roots)

    def since(self, sequence: int) -> set[str]:
        """Every document below what events after ``sequence`` are about: what an older look may have missed.

        Events that give something up bring nothing into use.
        """
        newer = (events.c.sequence > sequence) & events.c.kind.not_in(GIVING_UP)
        query = select(events.c.subject).where(newer).distinct()
        return self.closure(_existing(self.connection, self.connection.scalars(query).all()))

    def _below(self, digest: str) -> set[str]:
        document = read(self.connection, digest)
        return references(document)[0] | self._suite_of(document)

    def _suite_of(self, document: dict[str, Any]) -> set[str]:
        """The suite behind an evaluation, which names it by the digest of its items and not of the asset."""
        if document.get("schema") != Evaluation.SCHEMA:
            return set()
        return self._suites.get(document["suite"], set())

    def _newest_suites(self) -> set[str]:
        newest = select(assets.c.name, func.max(assets.c.number).label("number"))
        newest_of = newest.where(assets.c.kind == "suite").group_by(assets.c.name).subquery()
        same = (assets.c.name == newest_of.c.name) & (assets.c.number == newest_of.c.number)
        query = select(assets.c.digest).join(newest_of, same).where(assets.c.kind == "suite")
        return set(self.connection.scalars(query))

    def _open_records(self) -> set[str]:
        connection, found, finished = self.connection, set(), set()
        for row in connection.execute(_records("update")).all():
            if row.status not in FINISHED:
                found.add(row.document)
            else:
                finished.add(_work(read(connection, row.document)))
        for row in connection.execute(_records("plan")).all():
            # A plan that a person asked for stays `manual`: it is open until its update has run.
            if row.status == "open" or (
                row.status == "manual" and _work(read(connection, row.document)) not in finished
            ):
                found.add(row.document)
        pending = _records("signal").where(records.c.status == "pending")
        return found | {row.document for row in connection.execute(pending)}

    def _stands(self, decision: dict[str, Any]) -> bool:
        champion = alias_room.read(self.connection, decision["model"], alias_room.CHAMPION)
        return champion is not None and champion.revision == decision["champion_revision"]


def given_up(connection: Connection, gone: set[str]) -> set[str]:
    """The documents whose blobs nothing keeps, when the versions and assets ``gone`` are given up.

    These are the assets among them, and each content that only such versions have and that no other content
    sits on.
    """
    lost: set[str] = set()
    kept: set[str] = set()
    for row in stream(connection, select(versions.c.digest, versions.c.content)):
        (lost if row.digest in gone else kept).add(row.content)
    lost -= kept
    if lost:
        bases = {
            digest: document["base"]
            for digest, document in _documents(connection, (Content.SCHEMA,))
            if document["base"]
        }
        for content in bases.keys() - lost:
            while content := bases.get(content, ""):
                lost.discard(content)
    return lost | (gone & set(connection.scalars(select(assets.c.digest))))


def named_blobs(
    connection: Connection, without: set[str], progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """The digest of every blob that a document names, those of the documents ``without`` left out.

    Raises ``BadInput`` for a document of a newer Meristem (it may name blobs that this one does not see),
    ``Tampered`` for one that was altered.
    """
    for schema in connection.scalars(select(documents.c.schema).distinct()).all():
        references({"schema": schema})
    schemas = blob_schemas()
    count = select(func.count()).select_from(documents).where(documents.c.schema.in_(schemas))
    total = connection.scalar(count) or 0
    for done, (digest, document) in enumerate(_documents(connection, schemas), start=1):
        if digest not in without:
            yield from references(document)[1]
        if progress and (done % 64 == 0 or done == total):
            progress(done, total)


def sort_blobs(
    connection: Connection, without: set[str], progress: Callable[[int, int], None] | None = None
) -> tuple[set[str], set[str]]:
    """``(needed, dead)``: the blobs of the index that ``named_blobs`` tells of, and all others.

    Raises ``Tampered`` when a needed one is not in the index: then its row is lost, and what holds the bytes looks like
    waste. Else as ``named_blobs``.
    """
    needed: set[str] = set()
    dead = set(connection.scalars(select(blobs.c.digest)))
    missing: set[str] = set()
    for blob in named_blobs(connection, without, progress):
        if blob in dead:
            dead.remove(blob)
            needed.add(blob)
        elif blob not in needed:
            missing.add(blob)
    if missing:
        raise Tampered(
            f"{len(missing)} blobs that documents name are not in the index, the first is {min(missing)}; nothing was "
            "removed; run `meristem store reindex`, and restore from a backup what it does not find"
        )
    return needed, dead


def named_among(connection: Connection, digests: set[str], known: Container[str]) -> set[str]:
    """Those of ``digests`` that documents name at this moment. ``known``: all that were named a while ago.

    What came into use since then has a row in the index, and is not asked for.
    """
    suspects = {digest for digest in digests if digest in known}
    if not suspects:
        return set()
    return suspects.intersection(named_blobs(connection, given_up(connection, all_given_up(connection))))


def blobs_of(connection: Connection, found: Iterable[str]) -> set[str]:
    """The blobs that these documents name."""
    return {blob for digest in found for blob in references(read(connection, digest))[1]}


def learners(connection: Connection, data: set[str]) -> set[str]:
    """Every version that was trained on one of the data sets ``data``, or grew from one that was."""
    learned: set[str] = set()
    children: dict[str, set[str]] = defaultdict(set)
    for digest, document in _documents(connection, (Version.SCHEMA,)):
        if data & set(document["data"]):
            learned.add(digest)
        for parent in {*document["parents"], *filter(None, [document["base"]])}:
            children[parent].add(digest)
    queue = list(learned)
    while queue:
        new = children[queue.pop()] - learned
        learned |= new
        queue += new
    return learned


def read(connection: Connection, digest: str) -> dict[str, Any]:
    """A document, checked. Raises ``Tampered``: whoever decides what may go needs all of them."""
    body = connection.scalar(select(documents.c.body).where(documents.c.digest == digest))
    return _checked(digest, body)


def _documents(connection: Connection, schemas: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    query = select(documents.c.digest, documents.c.body).where(documents.c.schema.in_(list(schemas)))
    for row in stream(connection, query):
        yield row.digest, _checked(row.digest, row.body)


def _checked(digest: str, body: bytes | None) -> dict[str, Any]:
    if not isinstance(body, bytes) or digest_bytes(body) != digest:
        what = "is missing" if body is None else "does not match its digest"
        raise Tampered(f"document {digest} {what}; `meristem log verify` lists everything that is wrong")
    document: dict[str, Any] = parse(body)
    return document


def _records(kind: str) -> Any:
    return select(records.c.document, records.c.status).where(records.c.kind == kind)


def _work(document: dict[str, Any]) -> tuple[Any, ...]:
    """What a plan and the update that carries it out have in common."""
    return document["parent"], tuple(document["data"]), document["recipe"]


def _suites(connection: Connection) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for digest in connection.scalars(select(assets.c.digest).where(assets.c.kind == "suite")).all():
        facts = Asset.from_document(read(connection, digest)).facts
        found[facts.get("digest", "")].add(digest)
    return found


def _existing(connection: Connection, digests: Iterable[str]) -> set[str]:
    wanted, found = list(digests), set()
    for start in range(0, len(wanted), _LOOKUP):
        query = select(documents.c.digest).where(documents.c.digest.in_(wanted[start : start + _LOOKUP]))
        found |= set(connection.scalars(query))
    return found
