"""Signed heads of the chain, in the database and, as an anchor, somewhere else.

A checkpoint is one canonical JSON object and an Ed25519 signature over exactly its bytes::

    {"schema": "meristem/checkpoint/v1", "store": "sha256:...", "sequence": 7, "head": "sha256:...",
     "key": "<public key, hex>", "time": "2026-11-22T18:01:59.123456Z"}

``store`` is the hash of event 1, which no two workspaces share. In the database body and signature are raw bytes. In an
anchor file each checkpoint is one line: the canonical JSON of the fields with ``signature`` in hex among them.

Whoever can write to the workspace can cut the log's tail, or compute all of it anew and sign that with a key of their
own. Only what lies elsewhere tells: so an anchor's keys are the root of trust wherever one is given.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, LargeBinary, cast, insert, select

from meristem.errors import BadInput, EnvironmentFailure, Tampered
from meristem.store import evidence, keys
from meristem.store.canonical import canonical, parse
from meristem.store.files import disk_failure, sync_folder
from meristem.store.keys import Keyring, SigningKey
from meristem.store.schema import checkpoints, events

SCHEMA = "meristem/checkpoint/v1"
_FIELDS: dict[str, type] = {"store": str, "sequence": int, "head": str, "key": str, "time": str}
_BEGINNING = b'{"head":"sha256:'  # of every line: canonical JSON sorts the fields
_AT_ONCE = 1000
Report = Callable[[str, int | None], None]  # what is wrong, the first event that it may concern


@dataclass(frozen=True)
class Checkpoint:
    store: str
    sequence: int
    head: str
    key: str
    time: str
    body: bytes
    signature: bytes

    @classmethod
    def from_body(cls, body: bytes, signature: bytes) -> Checkpoint:
        """Raises ``ValueError`` unless ``body`` is the canonical JSON of a checkpoint."""
        fields = parse(body)
        if not isinstance(fields, dict) or fields.pop("schema", None) != SCHEMA:
            raise ValueError(f"not a {SCHEMA} document")
        if {name: type(value) for name, value in fields.items()} != _FIELDS:
            raise ValueError("its fields are not those of a checkpoint")
        if not keys.is_public(fields["key"]):
            raise ValueError("its key is not the hex of a public key")
        if canonical({"schema": SCHEMA, **fields}) != body:
            raise ValueError("it is not canonical JSON")
        return cls(**fields, body=body, signature=signature)

    @classmethod
    def from_line(cls, line: bytes) -> Checkpoint:
        """Raises ``ValueError`` unless ``line`` is what ``line()`` gives, byte for byte."""
        fields = parse(line)
        signature = fields.pop("signature", None) if isinstance(fields, dict) else None
        if not isinstance(signature, str) or not keys.is_signature(signature):
            raise ValueError("it has no signature of 128 hex digits in lower case")
        made = cls.from_body(canonical(fields), bytes.fromhex(signature))
        if made.line() != line:
            raise ValueError("it is not canonical JSON")
        return made

    def line(self) -> bytes:
        return canonical({**parse(self.body), "signature": self.signature.hex()})

    @property
    def genuine(self) -> bool:
        return keys.genuine(self.key, self.signature, self.body)


@dataclass(frozen=True)
class Mark:
    """Events 1 to ``sequence`` are vouched for: by a signature of ``key`` at ``time``, or by a head kept outside."""

    sequence: int
    key: str | None = None
    time: str | None = None


# Signing


def sign(connection: Connection, key: SigningKey) -> Checkpoint:
    """A checkpoint of the head as this write transaction finds it; the same head again is the same checkpoint.

    Raises ``BadInput`` when ``key`` may not sign, ``Tampered`` when the checkpoint that is there is not one.
    """
    sequence, head = evidence.head(connection)
    standing = keys.registered(connection).get(key.public)
    if standing is None:
        raise BadInput(
            f"the key {key.public[:12]} is not registered; `meristem key add --file FILE` does that"
        )
    if not standing.counts_at(sequence):
        raise BadInput(
            f"the key {key.public[:12]} was rotated out by event {standing.until}; use its successor"
        )
    where = (checkpoints.c.sequence == sequence) & (checkpoints.c.key == key.public)
    row = connection.execute(select(checkpoints.c.body, checkpoints.c.signature).where(where)).first()
    if row is not None:
        return _present(row.body, row.signature, head)
    fields = {
        "schema": SCHEMA,
        "store": evidence.hash_at(connection, 1),
        "sequence": sequence,
        "head": head,
        "key": key.public,
        "time": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
    }
    body = canonical(fields)
    made = Checkpoint.from_body(body, key.sign(body))
    connection.execute(
        insert(checkpoints).values(sequence=sequence, key=key.public, body=body, signature=made.signature)
    )
    return made


def _present(body: bytes, signature: bytes, head: str) -> Checkpoint:
    try:
        found = Checkpoint.from_body(body, signature)
    except (ValueError, TypeError, RecursionError) as error:
        raise Tampered(f"the checkpoint of the head cannot be read ({error})") from error
    if not found.genuine or found.head != head:
        raise Tampered(
            f"the checkpoint of event {found.sequence} is not the head's; run `meristem log verify`"
        )
    return found


def export(connection: Connection) -> Iterator[bytes]:
    """One line of JSON per event, its stored bytes as they are, and after them one per checkpoint.

    Raises ``Tampered`` for what would not be one line.
    """
    query = select(events.c.sequence, events.c.body).order_by(events.c.sequence)
    for row in connection.execute(query.execution_options(yield_per=_AT_ONCE)):
        if b"\n" in row.body:
            raise Tampered(f"event {row.sequence} is not canonical JSON; run `meristem log verify`")
        yield row.body + b"\n"
    for row in connection.execute(_all().execution_options(yield_per=_AT_ONCE)):
        try:
            yield Checkpoint.from_body(row.body, row.signature).line() + b"\n"
        except (ValueError, TypeError, RecursionError) as error:
            raise Tampered(f"the checkpoint of event {row.sequence} cannot be read ({error})") from error


def _all() -> Any:
    raw = (
        cast(column, LargeBinary).label(column.name)
        for column in (checkpoints.c.body, checkpoints.c.signature)
    )
    columns = (checkpoints.c.sequence, checkpoints.c.key, *raw)
    return select(*columns).order_by(checkpoints.c.sequence, checkpoints.c.key)


# Anchors


class Anchor:
    """A file outside the workspace with one checkpoint per line, oldest first; only ever appended to."""

    def __init__(self, path: Path, workspace: Path):
        """Raises ``BadInput`` for a file inside ``workspace``."""
        keys.refuse_inside(path, workspace, "the anchor")
        self.path = path

    def read(self) -> list[tuple[str, Checkpoint]]:
        """``(file:line, checkpoint)`` of every line; signatures are not checked.

        Raises ``BadInput`` for a line that is no checkpoint and for a file without any.
        """
        if not self.path.exists():
            raise BadInput(
                f"{self.path}: no such file; `meristem log checkpoint --anchor {self.path}` makes it"
            )
        body = self._bytes()
        cut = body.rfind(b"\n") + 1
        found = self._lines(body[:cut])
        if cut < len(body):
            problem = "the last line is unfinished; take another checkpoint with this anchor, which mends it"
            raise BadInput.at(self.path, len(found) + 1, problem)
        if not found:
            raise BadInput(
                f"{self.path}: the anchor holds no checkpoint; `meristem log checkpoint` writes them"
            )
        return found

    def append(self, checkpoint: Checkpoint) -> bool:
        """Add ``checkpoint``, durably, and say whether it was missing.

        A last line without an end is from an append that broke off: it was never acknowledged, and is dropped.
        Raises ``BadInput`` when the file holds something else, or another workspace's checkpoints.
        """
        try:
            with self.path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                body = self._bytes()
                cut = body.rfind(b"\n") + 1
                held = self._lines(body[:cut])
                if any(other.store != checkpoint.store for _, other in held):
                    raise BadInput(
                        f"{self.path}: this anchor belongs to another workspace; give one of its own"
                    )
                if not _BEGINNING.startswith(body[cut:][: len(_BEGINNING)]):
                    raise BadInput.at(self.path, len(held) + 1, "not a checkpoint; give another file")
                missing = all(other != checkpoint for _, other in held)
                if cut < len(body):
                    file.truncate(cut)
                if missing:
                    file.write(checkpoint.line() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            sync_folder(
                self.path.parent
            )  # also of a file that was there: whoever made it may have died before this
        except OSError as error:
            raise disk_failure(error, self.path) from error
        return missing

    def _lines(self, body: bytes) -> list[tuple[str, Checkpoint]]:
        found = []
        for number, line in enumerate(body.split(b"\n")[:-1], start=1):
            try:
                found.append((f"{self.path}:{number}", Checkpoint.from_line(line)))
            except (ValueError, TypeError, RecursionError) as error:
                problem = f"not a checkpoint ({error}); an anchor must stay as it was written"
                raise BadInput.at(self.path, number, problem) from error
        return found

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise disk_failure(error, self.path) from error


def pipe(checkpoint: Checkpoint, command: str) -> None:
    """Let the shell run ``command`` with the checkpoint's line on its standard input, for a place that is no file here.

    The command comes from the command line alone and never from a configuration: a workspace travels, and opening
    somebody's folder must not run what they wrote into it. Raises ``EnvironmentFailure`` unless it exits with 0.
    """
    if not command.strip():
        raise BadInput("--anchor-command: give a command")
    try:
        line = checkpoint.line() + b"\n"
        done = subprocess.run(command, shell=True, input=line, capture_output=True, check=False)
    except OSError as error:
        raise EnvironmentFailure(
            f"{command}: {error.strerror or error}; the head is not anchored: mend that, then repeat the command"
        ) from error
    if done.returncode != 0:
        told = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise EnvironmentFailure(
            f"{' '.join(command.split())} ended with {done.returncode} ({' '.join(told) or 'it said nothing'}); "
            "the head is not anchored: mend that, then repeat the command"
        )


# Checking


def examine(
    connection: Connection,
    ring: Keyring,
    anchor: list[tuple[str, Checkpoint]],
    report: Report,
) -> tuple[Mark | None, Mark | None]:
    """Hold the chain against every checkpoint; returns how far it is anchored, and how far signed in the workspace.

    ``ring`` are the keys that the chain let in. With an ``anchor`` its keys are the root of trust: every checkpoint
    and every other key must lead back to them.
    """
    examiner = _Examiner(connection, ring, report)
    anchored = examiner.outside(anchor)
    if anchor:
        examiner.refuse_strangers({line.key for _, line in anchor if line.genuine}, anchored)
    return anchored, examiner.inside(anchored)


class _Examiner:
    def __init__(self, connection: Connection, ring: Keyring, report: Report):
        self.connection, self.ring, self.report = connection, ring, report
        self.last, _ = evidence.head(connection)
        self.store = evidence.hash_at(connection, 1)
        self.strangers: set[str] = set()

    def outside(self, anchor: list[tuple[str, Checkpoint]]) -> Mark | None:
        good: Mark | None = None
        foreign = [where for where, line in anchor if line.genuine and line.store != self.store]
        if foreign:  # told once, not for every line
            self.report(
                f"{foreign[0]}: this anchor is of another workspace, or the chain was computed anew from its first "
                "event; give this workspace's own anchor if it is the wrong file",
                1,
            )
        for where, line in sorted(anchor, key=lambda entry: entry[1].sequence):
            if where not in foreign and self._holds(where, line, good):
                good = Mark(line.sequence, line.key, line.time)
                self._refuse_unless_kept(where, line)
        return good

    def inside(self, anchored: Mark | None) -> Mark | None:
        good = anchored
        for row in self.connection.execute(_all().execution_options(yield_per=_AT_ONCE)):
            where = f"checkpoint of event {row.sequence}"
            try:
                found = Checkpoint.from_body(row.body, row.signature)
            except (ValueError, TypeError, RecursionError) as error:
                self.report(f"{where}: it cannot be read ({error})", None)
                continue
            if (found.sequence, found.key) != (row.sequence, row.key):
                self.report(f"{where}: its index columns do not match its bytes", None)
            elif found.key in self.strangers:
                self.report(
                    f"{where}: its key {found.key[:12]} does not lead back to the anchor's keys", None
                )
            elif self._holds(where, found, good) and (good is None or found.sequence > good.sequence):
                good = Mark(found.sequence, found.key, found.time)
        return good if good != anchored else None

    def refuse_strangers(self, roots: set[str], anchored: Mark | None) -> None:
        """Keys that neither the anchored events nor a trusted key let in."""
        for key in self.ring:  # in the order of the chain: whoever vouched for a key comes before it
            known = key.public in roots or (anchored is not None and key.since <= anchored.sequence)
            if not known and (key.by == key.public or key.by in self.strangers):
                self.strangers.add(key.public)
                self.report(
                    f"event {key.since}: the key {key.public[:12]} does not lead back to the anchor's keys",
                    key.since,
                )

    def _holds(self, where: str, checkpoint: Checkpoint, good: Mark | None) -> bool:
        """Whether the chain is the one that was signed; ``good`` is the last place where it was."""
        unsure = (good.sequence if good else 0) + 1
        sequence = checkpoint.sequence
        if not checkpoint.genuine:
            self.report(f"{where}: the signature does not match", None)
        elif checkpoint.store != self.store:
            problem = (
                "it was made for another workspace, or the whole chain was computed anew from event 1 on"
            )
            self.report(f"{where}: {problem}", 1)
        elif sequence > self.last:
            self.report(
                f"{where}: event {sequence} was signed and is gone, the chain ends at event {self.last}: its tail was "
                f"cut off, or it was computed anew from event {min(unsure, self.last + 1)} on at the earliest",
                min(unsure, self.last + 1),
            )
        elif evidence.hash_at(self.connection, sequence) != checkpoint.head:
            problem = f"event {sequence} is not the one that was signed: the chain was computed anew"
            self.report(f"{where}: {problem}, from event {unsure} on at the earliest", unsure)
        elif not self.ring.counts(checkpoint.key, sequence):
            problem = f"its key {checkpoint.key[:12]} may not sign event {sequence}: not registered then, or rotated out"
            self.report(f"{where}: {problem}", None)
        else:
            return True
        return False

    def _refuse_unless_kept(self, where: str, line: Checkpoint) -> None:
        """What was anchored stands in the workspace too, unless somebody removed it there."""
        match = (checkpoints.c.sequence == line.sequence) & (checkpoints.c.key == line.key)
        row = self.connection.execute(_all().where(match)).first()
        if row is None or (row.body, row.signature) != (line.body, line.signature):
            self.report(
                f"{where}: the workspace does not hold this checkpoint of event {line.sequence} any more",
                None,
            )


def position(connection: Connection, head: str) -> int | None:
    """The number of the event whose hash is ``head`` (0 for that of an empty log); None when there is none."""
    if head == evidence.GENESIS:
        return 0
    return connection.scalar(select(events.c.sequence).where(events.c.hash == head))
