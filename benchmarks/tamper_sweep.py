"""Everything in a workspace altered, byte by byte and as somebody with write access would: is all of it found?

    python -m benchmarks.tamper_sweep --out benchmarks/results/sweep-tamper.json [--workspace DEMO] [--seed 0]

Every byte of every event, document, checkpoint and signature is flipped twice (XOR with a random value; letters change
their case), and random bytes of the packs. Each flip is shown to the part of `log verify` that reads it; one in a
hundred to the whole of it. Then come the attacks that keep every hash right (`ATTACKS`), with and without an anchor.
It works on a copy of the workspace, or on one that it makes, about as large as the demo's. Exit code 1 when anything
was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from sqlalchemy import Connection, select, update

from meristem.ecosystem import aliases, assets, audit, ledger, models, versions
from meristem.ecosystem.records import Approval, Asset, Decision, Signal
from meristem.errors import MeristemError
from meristem.store import checkpoints, evidence, keys
from meristem.store.canonical import canonical, digest_bytes
from meristem.store.checkpoints import Anchor, Checkpoint
from meristem.store.packs import Blob, Location
from meristem.store.schema import checkpoints as checkpoint_table
from meristem.store.schema import documents, events
from meristem.store.store import Store

OUT = Path(__file__).parent / "results" / "sweep-tamper.json"
WHOLE = 100  # one flip in so many is shown to the whole of `log verify`
PACK_BYTES = 10_000
ORDER = 2**252 + 27742317777372353535851937790883648493  # of the group behind Ed25519
Lines = list[tuple[str, Checkpoint]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--workspace", type=Path, help="a workspace with SQLite and local packs; it is copied"
    )
    parser.add_argument("--pack-bytes", type=int, default=PACK_BYTES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tamper-sweep-") as folder:
        subject = prepare(Path(folder), args.workspace)
        found = sweep(subject, random.Random(args.seed), pack_bytes=args.pack_bytes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"seed": args.seed, **found}, indent=2) + "\n")
    print(f"{found['flips']} flips and {len(found['attacks'])} attacks, {found['missed']} missed: {args.out}")
    return 1 if found["missed"] else 0


@dataclass
class Subject:
    """The workspace's store, its anchor outside, and the folder that holds both."""

    folder: Path
    store: Store
    anchor: Lines

    def problems(self, anchored: bool = True) -> audit.Audit:
        return audit.verify(self.store, anchor=self.anchor if anchored else None)


@dataclass
class Tally:
    """``missed`` says where a flip was not found."""

    flips: int = 0
    whole: int = 0
    missed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def sweep(
    subject: Subject,
    randomness: random.Random,
    *,
    pack_bytes: int = PACK_BYTES,
    only: Callable[[int], bool] = lambda _number: True,
) -> dict[str, Any]:
    """The result file's content. ``only`` picks events and documents by their place in the table."""
    assert subject.problems().intact, subject.problems().problems
    whole = _Whole(subject)
    parts = {
        "events": lambda tally: flip_events(subject, randomness, only, whole, tally),
        "documents": lambda tally: flip_documents(subject, randomness, only, whole, tally),
        "checkpoints": lambda tally: flip_checkpoints(subject, randomness, tally),
        "key signatures": lambda tally: flip_key_signatures(subject, tally),
        "packs": lambda tally: flip_packs(subject, randomness, pack_bytes, whole, tally),
    }
    tallies = {}
    for name, part in parts.items():
        tallies[name] = Tally()
        started = time.monotonic()
        part(tallies[name])
        tallies[name].seconds = round(time.monotonic() - started, 1)
    assert subject.problems().intact
    attacks = [attacked(subject, attack, alone) for attack, alone in ATTACKS.items()]
    missed = sum(len(tally.missed) for tally in tallies.values()) + sum(not a["as_expected"] for a in attacks)
    return {
        "size": _size(subject),
        "flips": sum(tally.flips for tally in tallies.values()),
        "missed": missed,
        "parts": {name: asdict(tally) for name, tally in tallies.items()},
        "attacks": attacks,
    }


def _size(subject: Subject) -> dict[str, int]:
    found = subject.problems()
    packs = subject.store.packs
    return {
        "events": found.events,
        "documents": found.documents,
        "blobs": found.blobs,
        "pack_bytes": sum(packs.size(pack) for pack in packs.names()),
    }


# Flips


class _Whole:
    """Shows every hundredth flip to the whole of `log verify` as well."""

    def __init__(self, subject: Subject):
        self.subject, self.seen = subject, 0

    def look(self, tally: Tally, where: str, made: AbstractContextManager[None]) -> None:
        """``made``: the flip, for the length of a block."""
        self.seen += 1
        if self.seen % WHOLE == 0:
            tally.whole += 1
            with made:
                if self.subject.problems().intact:
                    tally.missed.append(f"{where} (by the whole of verify)")


def flipped(body: bytes, randomness: random.Random) -> Iterator[tuple[int, bytes]]:
    """``(place, altered body)``: each byte XORed with a random value, and each letter in the other case."""
    for at, byte in enumerate(body):
        others = {byte ^ randomness.randint(1, 255)} | (
            {byte ^ 0x20} if chr(byte).isascii() and chr(byte).isalpha() else set()
        )
        for other in sorted(others):
            yield at, body[:at] + bytes([other]) + body[at + 1 :]


def flip_events(
    subject: Subject, randomness: random.Random, only: Callable[[int], bool], whole: _Whole, tally: Tally
) -> None:
    for row in _rows(subject.store, select(events).order_by(events.c.sequence)):
        if not only(row.sequence):
            continue
        for at, body in flipped(row.body, randomness):
            where = f"event {row.sequence} byte {at}"
            with altered(subject.store, events.c.sequence == row.sequence, events, body=body) as connection:
                broken = [link.first for link in evidence.check_chain(connection) if link.problem]
            tally.flips += 1
            if broken[:1] != [row.sequence]:
                tally.missed.append(where)
            whole.look(tally, where, _replaced(subject.store, events, row, body))


def flip_documents(
    subject: Subject, randomness: random.Random, only: Callable[[int], bool], whole: _Whole, tally: Tally
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        projection = audit.Projection(Path(folder), lambda _problem, _first: None)
        reader = audit.DocumentReader(projection)
        for number, row in enumerate(_rows(subject.store, select(documents).order_by(documents.c.digest))):
            if not only(number):
                continue
            for at, body in flipped(row.body, randomness):
                where = f"document {row.digest} byte {at}"
                tally.flips += 1
                if _accepted(reader, row.digest, row.schema, body):
                    tally.missed.append(where)
                whole.look(tally, where, _replaced(subject.store, documents, row, body))
        projection.close()


def _accepted(reader: audit.DocumentReader, digest: str, schema: str, body: bytes) -> bool:
    try:
        reader.read(digest, schema, body)
    except (ValueError, TypeError, RecursionError, MeristemError):
        return False
    return True


def flip_checkpoints(subject: Subject, randomness: random.Random, tally: Tally) -> None:
    """Bodies and signatures; of a signature also its twin ``S + L``, which careless verifiers take for the same."""
    with subject.store.database.read() as connection:
        ring = keys.registered(connection)
    table = checkpoint_table
    for row in _rows(subject.store, select(table)):
        twin = int.from_bytes(row.signature[32:], "little") + ORDER
        changes = [
            *(("body", at, value) for at, value in flipped(row.body, randomness)),
            *(("signature", at, value) for at, value in flipped(row.signature, randomness)),
            ("signature", -1, row.signature[:32] + twin.to_bytes(32, "little")),
            ("signature", -2, row.signature + b"\0"),
            ("signature", -3, row.signature[:-1]),
        ]
        match = (table.c.sequence == row.sequence) & (table.c.key == row.key)
        for column, at, value in changes:
            problems: list[str] = []
            with altered(subject.store, match, table, **{column: value}) as connection:
                checkpoints.examine(connection, ring, [], lambda problem, _first: problems.append(problem))  # noqa: B023
            tally.flips += 1
            if not problems:
                tally.missed.append(f"checkpoint {row.sequence} {column} byte {at}")


def flip_key_signatures(subject: Subject, tally: Tally) -> None:
    """The signature inside each key event, altered by somebody who then computes all later hashes anew."""
    for row in _rows(subject.store, select(events).where(events.c.kind.startswith("key."))):
        signature = json.loads(row.body)["data"]["signature"]
        for at, digit in enumerate(signature):
            others = {"0" if digit != "0" else "1", digit.upper()} - {digit}
            for other in sorted(others):
                event = evidence.Event.from_body(row.body)
                data = event.data | {"signature": signature[:at] + other + signature[at + 1 :]}
                tally.flips += 1
                if _admitted(subject, event.sequence, canonical(json.loads(row.body) | {"data": data})):
                    tally.missed.append(f"event {row.sequence} signature digit {at}")


def _admitted(subject: Subject, sequence: int, body: bytes) -> bool:
    ring = keys.Keyring()
    for row in _rows(
        subject.store, select(events).where(events.c.kind.startswith("key.")).order_by(events.c.sequence)
    ):
        try:
            ring.admit(evidence.Event.from_body(body if row.sequence == sequence else row.body))
        except MeristemError:
            return False
    return True


def flip_packs(subject: Subject, randomness: random.Random, count: int, whole: _Whole, tally: Tally) -> None:
    packs = subject.store.packs
    names = list(packs.names())
    sizes = [packs.size(name) for name in names]
    entries = {name: list(packs.entries(name)) for name in names}
    for _ in range(count):
        (pack,) = randomness.choices(names, sizes)
        at = randomness.randrange(packs.size(pack))
        where = f"pack {pack} byte {at}"
        with _pack_byte(packs.path(pack), at, randomness.randint(1, 255)):  # type: ignore[attr-defined]
            tally.flips += 1
            if not _pack_problems(subject.store, pack, [e for e in entries[pack] if e.offset <= at < e.end]):
                tally.missed.append(where)
            whole.look(tally, where, nullcontext())


def _pack_problems(store: Store, pack: str, touched: list[Location]) -> bool:
    """As ``audit.check_pack``, but of the entries only the one that lies there: packs are large."""
    try:
        list(store.packs.entries(pack))
        for _ in store.packs.views(touched):
            pass
    except MeristemError:
        return True
    return False


@contextmanager
def _pack_byte(path: Path, at: int, by: int) -> Iterator[None]:
    """One byte of a file, altered for the length of a block."""

    def flip() -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            (byte,) = os.pread(descriptor, 1, at)
            os.pwrite(descriptor, bytes([byte ^ by]), at)
        finally:
            os.close(descriptor)

    flip()
    try:
        yield
    finally:
        flip()


class _OnlyLooked(Exception):
    """Takes a transaction back."""


@contextmanager
def altered(store: Store, where: Any, table: Any, **values: Any) -> Iterator[Connection]:
    """A connection that sees one row with other values; nothing is committed."""
    with suppress(_OnlyLooked), store.database.write() as connection:
        connection.execute(update(table).where(where).values(**values))
        yield connection
        raise _OnlyLooked


@contextmanager
def _replaced(store: Store, table: Any, row: Any, body: bytes) -> Iterator[None]:
    """The row with another body, for everybody to see, for the length of a block."""
    (key,) = table.primary_key
    statement = update(table).where(key == row[0])
    for value in (body, row.body):
        with store.database.write() as connection:
            connection.execute(statement.values(body=value))
        if value is body:
            yield


def _rows(store: Store, query: Any) -> list[Any]:
    with store.database.read() as connection:
        return list(connection.execute(query))


# Attacks: whoever can write to the workspace and knows the code, but holds no key. Each returns the first event that
# is not what it was.


@dataclass
class Attacker:
    db: sqlite3.Connection
    log: list[dict[str, Any]]  # every event
    signed: list[dict[str, Any]]  # every checkpoint
    strangers: list[keys.SigningKey]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for fields in self.log if fields["kind"] == kind]

    def rechain(self, sign: Callable[[dict[str, Any]], None] = lambda _fields: None) -> list[str]:
        """Write the log anew with consistent hashes, without the checkpoints; returns the hashes.

        ``sign`` may change an event once the one before it stands.
        """
        self.db.execute("DELETE FROM events")
        self.db.execute("DELETE FROM checkpoints")
        hashes = [evidence.GENESIS]
        for number, fields in enumerate(self.log, start=1):
            fields |= {"sequence": number, "previous": hashes[-1]}
            sign(fields)
            body = canonical(fields)
            hashes.append(digest_bytes(body))
            row = (number, hashes[-1], fields["kind"], fields["subject"], body)
            self.db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)
        return hashes[1:]


def cut_tail(attacker: Attacker) -> int:
    """The last move of an alias never happened: its event, its rows and all checkpoints are gone."""
    last = attacker.log.pop()
    data = last["data"]
    attacker.db.execute("DELETE FROM alias_moves WHERE event = ?", (last["sequence"],))
    attacker.db.execute(
        "UPDATE aliases SET version = ?, revision = revision - 1 WHERE model = ? AND alias = ?",
        (data["previous"], data["model"], data["alias"]),
    )
    attacker.rechain()
    return int(last["sequence"])


def recomputed_chain(attacker: Attacker) -> int:
    """Somebody else did everything since the last key event."""
    first = max(fields["sequence"] for fields in attacker.log if fields["kind"].startswith("key.")) + 1
    for fields in attacker.log[first - 1 :]:
        fields["actor"] = "eve"
    attacker.rechain()
    return first


def replayed_approval(attacker: Attacker) -> int:
    """An older approval once more, as one more of its kind, in the place of an event that nothing depends on."""
    approval, place = attacker.of("approval.opened")[0], attacker.of("signal.closed")[-1]
    signal, sequence = place["data"]["number"], place["sequence"]
    (number,) = attacker.db.execute("SELECT max(number) + 1 FROM records WHERE kind = 'approval'").fetchone()
    attacker.db.execute(
        "UPDATE records SET status = 'pending' WHERE kind = 'signal' AND number = ?", (signal,)
    )
    attacker.db.execute(
        "INSERT INTO records SELECT kind, ?, model, document, status, result FROM records "
        "WHERE kind = 'approval' AND number = ?",
        (number, approval["data"]["number"]),
    )
    place.update(approval | {"data": approval["data"] | {"number": number}})
    attacker.rechain()
    return int(sequence)


def repeated_approval(attacker: Attacker) -> int:
    """An older approval once more, word for word, behind everything else."""
    attacker.log.append(dict(attacker.of("approval.opened")[0]))
    attacker.rechain()
    return len(attacker.log)


def swapped_subject(attacker: Attacker) -> int:
    """The alias always pointed at the other version, says every table and every hash."""
    last = attacker.log[-1]
    data = last["data"]
    where = (data["model"], last["subject"])
    (other,) = attacker.db.execute(
        "SELECT digest FROM versions WHERE model = ? AND digest <> ?", where
    ).fetchone()
    last["subject"] = other
    attacker.db.execute("UPDATE alias_moves SET version = ? WHERE event = ?", (other, last["sequence"]))
    attacker.db.execute(
        "UPDATE aliases SET version = ? WHERE model = ? AND alias = ?", (other, data["model"], data["alias"])
    )
    attacker.rechain()
    return int(last["sequence"])


def deleted_checkpoint(attacker: Attacker) -> None:
    """Nobody ever signed the head."""
    attacker.db.execute("DELETE FROM checkpoints WHERE sequence = (SELECT max(sequence) FROM checkpoints)")


def strangers_key(attacker: Attacker) -> int:
    """The whole log made anew, with keys of their own in the place of ours, and every checkpoint signed again."""
    ours = [fields for fields in attacker.log if fields["kind"].startswith("key.")]
    theirs = dict(zip((fields["data"]["key"] for fields in ours), attacker.strangers, strict=True))
    for fields in ours:
        body = canonical(keys.document(theirs[fields["data"]["key"]].public))
        fields["subject"] = digest_bytes(body)
        attacker.db.execute("INSERT INTO documents VALUES (?, ?, ?)", (fields["subject"], keys.SCHEMA, body))

    def sign(fields: dict[str, Any]) -> None:
        fields["actor"] = "eve"
        if fields in ours:
            new, by = theirs[fields["data"]["key"]], theirs[fields["data"]["by"]]
            statement = keys.statement(fields["kind"], new.public, by.public, fields["previous"])
            fields["data"] = {"key": new.public, "by": by.public, "signature": by.sign(statement).hex()}

    hashes = attacker.rechain(sign)
    for fields in attacker.signed:
        key = theirs[fields["key"]]
        head = hashes[fields["sequence"] - 1]
        body = canonical(fields | {"store": hashes[0], "head": head, "key": key.public})
        row = (fields["sequence"], key.public, body, key.sign(body))
        attacker.db.execute("INSERT INTO checkpoints VALUES (?, ?, ?, ?)", row)
    return 1


# The attack, and whether it is found without an anchor too.
ATTACKS: dict[Callable[[Attacker], int | None], bool] = {
    cut_tail: False,
    recomputed_chain: False,
    replayed_approval: False,
    repeated_approval: True,
    swapped_subject: False,
    deleted_checkpoint: False,
    strangers_key: False,
}


def attacked(subject: Subject, attack: Callable[[Attacker], int | None], alone: bool) -> dict[str, Any]:
    """What `log verify` says of a copy after ``attack``. ``alone``: it should be found without an anchor too."""
    with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
        copy = Subject(
            Path(folder), Store(copied(subject.store.root, Path(folder) / "store")), subject.anchor
        )
        strangers = [keys.load_or_make(Path(folder) / f"{n}.pem", copy.store.root) for n in range(2)]
        with closing(sqlite3.connect(copy.store.root / "meristem.db")) as db, db:
            log = [json.loads(body) for (body,) in db.execute("SELECT body FROM events ORDER BY sequence")]
            signed = [json.loads(body) for (body,) in db.execute("SELECT body FROM checkpoints")]
            first = attack(Attacker(db, log, signed, strangers))
        anchored, unaided = copy.problems(), copy.problems(anchored=False)
        copy.store.database.close()
    named = anchored.first_bad
    # What was anchored before stays sure; from the next event on everything may have been altered.
    sure = max((line.sequence for _, line in subject.anchor if first and line.sequence < first), default=0)
    return {
        "attack": attack.__name__.replace("_", " "),
        "found": not anchored.intact,
        "found_without_anchor": not unaided.intact,
        "first_altered": first,
        "first_named": named,
        "told": (anchored.first_problem or anchored.problems[0]).replace(f"{subject.folder}/", "")
        if anchored.problems
        else None,
        "as_expected": not anchored.intact
        and unaided.intact is not alone
        and (first is None or (named is not None and sure < named <= first)),
    }


# The workspace


def prepare(folder: Path, workspace: Path | None = None) -> Subject:
    """A store to alter, with keys, an approval and two anchored checkpoints; a copy of ``workspace`` if one is given."""
    if workspace is not None:
        store = Store(copied(workspace / ".meristem", folder / "store"))
    else:
        store = Store(folder / "store")
        store.root.mkdir()
        store.database.create()
        _fill(store, folder)
    model = _approve(store)
    anchor = Anchor(folder / "anchor.jsonl", store.root)
    first, second = (keys.load_or_make(folder / f"{name}.pem", store.root) for name in ("first", "second"))
    with store.transaction("kim", "keys") as tx:
        keys.add(tx, first, None)
    with store.database.write() as connection:
        made = checkpoints.sign(connection, first)
    anchor.append(made)
    with store.transaction("kim", "a newer key") as tx:
        keys.rotate(tx, first, second)
    for note in ("one more", "and another"):
        with store.transaction("kim", "noise") as tx:
            signal = Signal(kind="incident", model=model, note=note)
            ledger.set_status(tx, ledger.open_record(tx, "signal", signal, model, "pending"), "closed")
    with store.database.read() as connection:
        line = versions.of_model(connection, model)
    for version in line[-2:]:
        with store.transaction("kim", "try it out") as tx:
            aliases.point(tx, model, "canary", version.digest)
    with store.database.write() as connection:
        made = checkpoints.sign(connection, second)
    anchor.append(made)
    return Subject(folder, store, anchor.read())


def copied(source: Path, target: Path) -> Path:
    """A store of its own in ``target``."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("meristem.db*"))
    with (
        closing(sqlite3.connect(source / "meristem.db")) as old,
        closing(sqlite3.connect(target / "meristem.db")) as new,
    ):
        old.backup(new)
    return target


def _fill(store: Store, folder: Path) -> None:
    """About what the demo leaves: two models, ten versions, data and records."""
    source = folder / "source"
    source.mkdir()
    random_weights = np.random.default_rng(0)
    for step in range(3):
        tensors = {
            f"layers.{n}.weight": random_weights.normal(size=(48, 48)).astype(np.float32) for n in range(12)
        }
        save_file(tensors, source / "model.safetensors")
        (source / "config.json").write_text('{"model_type": "tiny"}')
        (source / "tokenizer.json").write_text("{}")
        if step == 0:
            models.add(store, "kim", "base", "foundation", str(source), None)
            models.add(store, "kim", "support", "industrial", None, "base")
        else:
            models.commit(store, "kim", "support", source, f"step {step}")
    for number in range(3):
        body = Blob.file("".join(json.dumps({"id": i, "text": f"{number}"}) for i in range(40)).encode())
        stored = store.put([body])
        with store.transaction("kim", "data") as tx:
            tx.add_blobs(stored)
            assets.add(tx, Asset(kind="dataset", name=f"tickets-{number}", files={"rows.jsonl": body.digest}))
    for number in range(8):
        with store.transaction("kim", "an incident") as tx:
            signal = Signal(kind="incident", model="support", note=f"incident {number}")
            opened = ledger.open_record(tx, "signal", signal, "support", "pending")
            ledger.set_status(tx, opened, "closed")


def _approve(store: Store) -> str:
    """An approval of a decision; returns the model that it is about, which has more than one version."""
    with store.database.read() as connection:
        model = next(
            m.name for m in models.all_models(connection) if len(versions.of_model(connection, m.name)) > 1
        )
        version = versions.of_model(connection, model)[-1]
        champion = aliases.champion(connection, model)
    with store.transaction("kim", "reviewed") as tx:
        decision = Decision(
            model=model,
            version=version.digest,
            champion=champion.version,
            champion_revision=champion.revision,
            plan=None,
            policy=tx.add_document({"schema": "meristem/policy/v1"}),
            evaluations=[],
            gates=[],
            outcome="pass",
            approvals_needed=1,
        )
        opened = ledger.open_record(tx, "decision", decision, model, "pass")
        approval = Approval(decision=opened.digest, actor="kim", reason="looks good")
        ledger.open_record(tx, "approval", approval, model, "given")
    return model


if __name__ == "__main__":
    sys.exit(main())
