"""What a bundle looks like: its manifest, the order of its documents, and which blobs belong to it.

Whoever writes a bundle and whoever reads one compute the order and the blobs by the same functions, so a bundle with
a document or a blob too many or too few cannot pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

from meristem.ecosystem.records import Asset, Content, Evaluation, Record, Version, references
from meristem.errors import Tampered
from meristem.store.canonical import canonical, digest_bytes, parse

MANIFEST = "bundle.json"
DOCUMENTS = "documents.jsonl"
EVIDENCE = "evidence.jsonl"
PACKS = "packs"
LIMITS = {MANIFEST: 16 << 20, DOCUMENTS: 256 << 20, EVIDENCE: 256 << 20}  # bytes; these are read whole
AT_ONCE = 256 << 20  # bytes of blobs in memory, and so in one pack of a bundle

# The events that say that the bytes of their subject were given up.
RETIREMENTS = ("version.retired", "asset.retired", "asset.deleted")

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TENSORS = "tensors"  # the field of a content or an asset whose blobs are tensors; all other blobs are files

Kind = Literal["tensor", "file"]


class Bundle(Record):
    """``bundle.json``. ``head`` is the hash of the newest event in the evidence, and ``sequence`` its number: it stands
    for everything that the pushing workspace had recorded up to it."""

    SCHEMA: ClassVar[str] = "meristem/bundle/v1"
    version: str
    label: str  # as the pushing workspace calls it
    documents: list[str]
    absent: list[str]  # data sets, versions, ... among the documents whose bytes had been given up
    packs: list[str]
    files: dict[str, str]
    sequence: int
    head: str


def is_digest(text: object) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def joined(bodies: Iterable[bytes]) -> bytes:
    """Canonical JSON holds no line break, so a line is a document."""
    return b"".join(body + b"\n" for body in bodies)


def ordered(roots: Iterable[str], read: Callable[[str], dict[str, Any]]) -> list[str]:
    """``roots`` and every document below them, each once and after all that it names."""
    done: dict[str, None] = {}
    waiting: list[tuple[str, bool]] = [(root, False) for root in reversed(list(roots))]
    while waiting:  # a line of ten thousand versions is as deep
        digest, below_is_done = waiting.pop()
        if digest in done:
            continue
        if below_is_done:
            done[digest] = None
            continue
        waiting.append((digest, True))
        below = sorted(references(read(digest))[0], reverse=True)
        waiting += [(name, False) for name in below if name not in done]
    return list(done)


def blobs(records: Mapping[str, Record | None], absent: Collection[str]) -> dict[str, set[Kind]]:
    """Every blob that must be there when the bytes of ``absent`` may be gone, and as what it is named."""
    named: dict[str, set[Kind]] = {}
    for record in _with_bytes(records, absent):
        for field in record.BLOBS:
            value = getattr(record, field)
            for digest in [value] if isinstance(value, str) else value.values():
                named.setdefault(digest, set()).add("tensor" if field == _TENSORS else "file")
    return named


def _with_bytes(records: Mapping[str, Record | None], absent: Collection[str]) -> Iterator[Record]:
    wanted = [r.content for d, r in records.items() if isinstance(r, Version) and d not in absent]
    contents: dict[str, Content] = {}
    while wanted:
        found = records[digest := wanted.pop()]
        if isinstance(found, Content) and digest not in contents:
            contents[digest] = found
            wanted += [found.base] if found.base else []
    yield from contents.values()
    for digest, record in records.items():
        if isinstance(record, Evaluation) or (isinstance(record, Asset) and digest not in absent):
            yield record


def document_of(where: str, body: bytes) -> dict[str, Any]:
    """A JSON object whose canonical bytes are ``body``."""
    try:
        found = parse(body)
        sound = isinstance(found, dict) and canonical(found) == body
    except (ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise Tampered(f"{where}: damaged (not canonical JSON)")
    document: dict[str, Any] = found
    return document


def lines_of(where: str, body: bytes) -> dict[str, dict[str, Any]]:
    """The documents of a file by digest, in the order in which they stand."""
    if not body.endswith(b"\n"):
        raise Tampered(f"{where}: cut short")
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(body[:-1].split(b"\n"), start=1):
        document = document_of(f"{where}:{number}", line)
        if found.setdefault(digest_bytes(line), document) is not document:
            raise Tampered(f"{where}:{number}: the same line twice")
    return found
