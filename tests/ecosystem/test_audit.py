"""``log verify``: whatever is altered behind the log's back is found, and named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing

import pytest
from sqlalchemy import Float, Integer, select, update
from tests.ecosystem import hf
from tests.ecosystem.test_models import grow

from meristem.data.datasets import ROWS_FILE
from meristem.ecosystem import aliases, assets, audit, ledger, models, records
from meristem.ecosystem.records import Asset, Evaluation, Plan, Record, Signal
from meristem.errors import EnvironmentFailure
from meristem.store import evidence, schema
from meristem.store.canonical import canonical, digest_bytes
from meristem.store.packs import Blob
from meristem.store.store import Store

SECRET = "the customer's private words"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A small store with a row in every table: two models, an adapter, data, an evaluation, records, moves."""
    folder = tmp_path_factory.mktemp("audit")
    store = Store(folder / "store")
    store.root.mkdir()
    store.database.create()
    base = models.add(store, "kim", "base", "foundation", str(hf.full(folder / "m")), None)
    models.add(store, "kim", "law", "industrial", str(hf.adapter(folder / "a")), "base")
    rows = Blob.file(json.dumps({"id": "1", "text": SECRET}).encode())
    results = Blob.file(b'[{"id":"1","score":1}]')
    with store.transaction("kim", "data") as tx:
        tx.add_blobs(store.packs.write([rows, results]))
        data = assets.add(
            tx, Asset(kind="dataset", name="tickets", files={ROWS_FILE: rows.digest}, facts={"rows": 1})
        )
        signal = ledger.open_record(
            tx, "signal", Signal(kind="new-data", model="base", data=[data.digest]), "base", "pending"
        )
        recipe = tx.add_document({"schema": "meristem/recipe/v1", "seed": 0})
        plan = Plan(
            model="base",
            action="update",
            reason="data",
            signals=[signal.digest],
            parent=base.digest,
            recipe=recipe,
        )
        opened = ledger.open_record(tx, "plan", plan, "base")
        ledger.set_status(tx, signal, "planned", opened.digest)
        key = {"content": base.content, "suite": "sha256:s", "engine": "sha256:e"}
        evaluation = tx.add_document(
            Evaluation(**key, settings={}, results=results.digest, summary={}).document()
        )
        tx.connection.execute(schema.evaluations.insert().values(**key, document=evaluation, seconds=1.0))
        tx.append("evaluation.recorded", evaluation, **key, results=results.digest, seconds=1.0)
    newer = grow(store, "base", 1)
    with store.transaction("kim") as tx:
        aliases.move(tx, "base", aliases.CHAMPION, newer.digest, 1)
    store.database.close()
    return folder / "store"


@pytest.fixture
def store(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "copy")
    made = Store(tmp_path / "copy")
    yield made
    made.database.close()


def execute(store, statement):
    with store.database.write() as connection:
        connection.exec_driver_sql(statement)


def test_an_honest_store_is_intact(store):
    seen = []
    found = audit.verify(store, lambda *step: seen.append(step))
    assert found.problems == []
    assert found.intact
    with store.database.read() as connection:
        assert (found.events, found.head) == evidence.head(connection)
    assert (found.documents, found.blobs) == (12, 11)
    assert seen[-1] == ("blobs", found.blobs, found.blobs)
    assert audit.verify(store, expected_head=found.head).intact
    assert audit.verify(store, expected_head=evidence.GENESIS).intact


INDEXES = [table for table in schema.metadata.sorted_tables if table.name != "settings"]
COLUMNS = [(table, column) for table in INDEXES for column in table.columns]


@pytest.mark.parametrize(("table", "column"), COLUMNS, ids=[f"{t.name}.{c.name}" for t, c in COLUMNS])
def test_every_altered_cell_is_found(store, table, column):
    """Each row of each table in turn gets another value in this column."""
    with store.database.read() as connection:
        rows = list(connection.execute(select(table)))
    assert rows
    for row in rows[:3]:
        keys = [(c, row._mapping[c.name]) for c in table.primary_key]
        old = row._mapping[column.name]
        values = [
            77 if isinstance(column.type, Integer | Float) else b"{}" if isinstance(old, bytes) else "changed"
        ]
        values += [None] if column.nullable and old is not None else []
        for value in values:
            with store.database.write() as connection:
                where = [(c == (value if c is column else key)) for c, key in keys]
                connection.execute(
                    update(table).where(*[c == key for c, key in keys]).values({column.name: value})
                )
                assert connection.execute(select(table).where(*where)).first() is not None
            assert not audit.verify(store).intact, (row, value)
            with store.database.write() as connection:
                connection.execute(update(table).where(*where).values({column.name: old}))
    assert audit.verify(store).intact


@pytest.mark.parametrize("table", INDEXES, ids=[table.name for table in INDEXES])
def test_every_lost_row_is_found(store, table):
    with store.database.read() as connection:
        rows = list(connection.execute(select(table)))
    for row in rows:
        with store.database.write() as connection:
            connection.execute(table.delete().where(*[c == row._mapping[c.name] for c in table.primary_key]))
        last_event = table is schema.events and row.sequence == len(rows)
        assert not audit.verify(store).intact or last_event, row
        with store.database.write() as connection:
            connection.execute(table.insert().values(**row._mapping))


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO models VALUES ('ghost', 'foundation', NULL, 'sha256:0')",
        "INSERT INTO versions VALUES ('sha256:0', 'base', 9, 'sha256:0')",
        "INSERT INTO assets VALUES ('sha256:0', 'dataset', 'ghost', 1)",
        "INSERT INTO aliases SELECT model, 'canary', version, 1 FROM aliases WHERE model = 'base'",
        "INSERT INTO records VALUES ('decision', 1, 'base', 'sha256:0', 'pass', NULL)",
        "INSERT INTO evaluations VALUES ('sha256:0', 'sha256:s', 'sha256:e', 'sha256:0', 1.0)",
        "UPDATE records SET status = 'done' WHERE kind = 'plan'",
        "UPDATE aliases SET version = (SELECT digest FROM versions WHERE model = 'base' AND number = 1) WHERE model = 'base'",
        "UPDATE aliases SET revision = 1 WHERE model = 'base'",
    ],
)
def test_what_the_log_does_not_know_is_found(store, statement):
    execute(store, statement)
    assert "does not match the evidence" in " ".join(audit.verify(store).problems)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE blobs SET offset = 'x'",
        "UPDATE blobs SET offset = -1",
        "UPDATE blobs SET length = 1.5",
        "UPDATE blobs SET shape = '{'",
        "UPDATE blobs SET shape = '[null]'",
        "UPDATE documents SET body = CAST(body AS TEXT) || ' '",
        "UPDATE documents SET body = 7",
        "UPDATE events SET body = 'text'",
        "UPDATE events SET body = 7",
        "INSERT INTO documents VALUES ('sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945', 'x', CAST('[]' AS BLOB))",
        "UPDATE records SET number = 'x' WHERE kind = 'plan'",
    ],
)
def test_values_of_the_wrong_type_are_problems_and_not_crashes(store, statement):
    execute(store, statement)
    assert not audit.verify(store).intact


def test_an_event_with_senseless_data_is_a_problem_and_not_a_crash(store):
    """A whole chain recomputed by somebody who did not read the code."""
    with store.transaction("eve") as tx:
        tx.append("model.added", "sha256:0")
        tx.append("plan.opened", "sha256:0", model=[])
    assert "do not say what happened" in " ".join(audit.verify(store).problems)


JUNK = [None, 5, "x", [], [[]], [5], {}, {"a": []}, {"a": {}}]


def test_events_of_the_wrong_shape_are_problems_and_not_crashes(store):
    """Every field of every event in turn, in a log whose hashes were recomputed."""
    with store.database.read() as connection:
        last = json.loads(connection.scalars(select(schema.events.c.body)).all()[-1])
    assert last["kind"] == "alias.moved"
    for field in ("data", "subject", "kind", "actor", "time"):
        for junk in JUNK:
            _rewritten(store, lambda events, put=last | {field: junk}: events[-1].update(put))
            assert audit.verify(store).intact is (field in ("actor", "time")), (field, junk)


def test_documents_of_the_wrong_shape_are_problems_and_not_crashes(store):
    """Every field that should name something else, in a document that matches its digest."""
    for kind in Record.__subclasses__():
        for field in (*kind.DOCUMENTS, *kind.BLOBS):
            for junk in [junk for junk in JUNK if junk not in (None, [], {})]:
                body = canonical({"schema": kind.SCHEMA, field: junk})
                with store.database.write() as connection:
                    row = {"digest": digest_bytes(body), "schema": kind.SCHEMA, "body": body}
                    connection.execute(schema.documents.insert().values(**row))
                with store.database.read() as connection:  # the part of `verify` that reads documents
                    found = audit.Audit()
                    audit._check_documents(connection, audit._Expected(), found)
                assert found.problems or (junk == "x" and field in kind.BLOBS), (kind, field, junk)
                execute(store, f"DELETE FROM documents WHERE digest = '{digest_bytes(body)}'")


def test_every_byte_of_every_pack_counts(store):
    """Headers too: from them the index can be rebuilt."""
    for path in sorted(store.packs.root.iterdir(), key=lambda path: path.stat().st_size)[:2]:
        good = path.read_bytes()
        for at in range(len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            assert _pack_problems(store), (path, at)
        path.write_bytes(good)
    assert audit.verify(store).intact


def _pack_problems(store):
    """The part of ``verify`` that reads packs: the rest is the same in every step."""
    found = audit.Audit()
    with store.database.read() as connection:
        locations = audit._locations(connection, {}, found)
    audit._check_packs(store, sorted({location.pack for location in locations}), found)
    audit._check_blobs(store, locations, found, None)
    return found.problems


def test_a_missing_a_cut_and_an_unreadable_pack_are_found(store, monkeypatch):
    path = sorted(store.packs.root.iterdir())[0]
    good = path.read_bytes()
    for body in (good[:-1], good[:4], b""):
        path.write_bytes(body)
        assert path.stem in " ".join(audit.verify(store).problems)
    path.unlink()
    assert "the pack is missing" in " ".join(audit.verify(store).problems)
    path.write_bytes(good)

    def refuse(_location):
        raise EnvironmentFailure("Input/output error")

    monkeypatch.setattr(store.packs, "read", refuse)
    assert len(audit.verify(store).problems) == 11  # every blob is named, not only the first


def _rewritten(store, change):
    """The whole log recomputed with consistent hashes after ``change`` of its list of events."""
    with closing(sqlite3.connect(store.database.path)) as connection, connection:
        bodies = [
            json.loads(body) for (body,) in connection.execute("SELECT body FROM events ORDER BY sequence")
        ]
        change(bodies)
        connection.execute("DELETE FROM events")
        previous = evidence.GENESIS
        for number, fields in enumerate(bodies, 1):
            body = canonical(fields | {"sequence": number, "previous": previous})
            previous = digest_bytes(body)
            row = (number, previous, str(fields["kind"]), str(fields["subject"]), body)
            connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)


def test_a_recomputed_chain_needs_a_head_kept_outside(store):
    head = audit.verify(store).head
    _rewritten(store, lambda events: [event.update(actor="eve") for event in events])
    assert audit.verify(store).intact
    (problem,) = audit.verify(store, expected_head=head).problems
    assert head in problem


def test_a_cut_tail_needs_a_head_kept_outside(store):
    before = audit.verify(store).head
    with store.transaction("kim") as tx:
        moved = aliases.move(tx, "base", "canary", aliases.champion(tx.connection, "base").version, 0)
    head = audit.verify(store, expected_head=before).head
    execute(store, "DELETE FROM events WHERE sequence = (SELECT max(sequence) FROM events)")
    assert not audit.verify(store).intact  # the tables still show it
    execute(store, f"DELETE FROM aliases WHERE alias = '{moved.name}'")
    execute(store, f"DELETE FROM alias_moves WHERE alias = '{moved.name}'")
    assert audit.verify(store).intact
    assert audit.verify(store, expected_head=before).intact
    assert not audit.verify(store, expected_head=head).intact


def test_events_hold_digests_and_never_text_of_the_data(store):
    with store.database.read() as connection:
        bodies = b"".join(connection.scalars(select(schema.events.c.body)))
        held = b"".join(connection.scalars(select(schema.documents.c.body)))
    assert SECRET.encode() not in bodies + held
    assert any(SECRET.encode() in path.read_bytes() for path in store.packs.root.iterdir())


def test_every_record_says_what_it_reaches():
    """A field that could hold a digest and is in neither list would be lost to audits and to gc."""
    beside = {
        "model", "kind", "name", "facts", "tasks", "code", "note", "details", "action", "reason", "attempt", "criteria",
        "budget", "steps", "tokens", "seconds", "curve", "settings", "summary", "gate", "suite", "outcome", "numbers",
        "needed", "arguments", "champion_revision", "gates", "approvals_needed", "actor", "revision", "engine", "tier",
        "source", "fingerprint",
    }  # fmt: skip
    for kind in Record.__subclasses__():
        if kind is records.Model:  # its base is a name
            continue
        assert set(kind.model_fields) - beside == {*kind.DOCUMENTS, *kind.BLOBS}, kind
