"""``log verify``: whatever is altered behind the log's back is found, and named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing, contextmanager, nullcontext

import pytest
from sqlalchemy import Float, Integer, select, update
from tests.ecosystem import hf
from tests.ecosystem.test_models import grow

from meristem.data.datasets import ROWS_FILE
from meristem.ecosystem import aliases, assets, audit, ledger, models, records, versions
from meristem.ecosystem.records import Asset, Evaluation, Plan, Record, Signal
from meristem.errors import BadInput, EnvironmentFailure
from meristem.store import checkpoints, evidence, index, keys, schema
from meristem.store.canonical import canonical, digest_bytes
from meristem.store.index import location_of
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
    stored = store.put([rows, results])
    with store.transaction("kim", "data") as tx:
        tx.add_blobs(stored)
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
        retired = assets.add(tx, Asset(kind="method-state", name="old", files={}, facts={}))
        event = tx.append("asset.retired", retired.digest, rule="method-state: 30")
        tx.connection.execute(schema.retired.insert().values(digest=retired.digest, event=event.sequence))
        aliases.protect(tx, "base", aliases.CHAMPION, ["kim", "lee"])
        aliases.move(tx, "base", aliases.CHAMPION, newer.digest, 1)
    store.database.close()
    return folder / "store"


@pytest.fixture
def store(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "copy")
    made = Store(tmp_path / "copy")
    yield made
    made.database.close()


@pytest.fixture
def anchored(store, tmp_path):
    """The store's anchor: a key is registered, and the head signed."""
    signer = keys.load_or_make(tmp_path / "key.pem", store.root)
    with store.transaction("kim") as tx:
        keys.add(tx, signer, None)
    with store.database.write() as connection:
        made = checkpoints.sign(connection, signer)
    return [("anchor:1", made)]


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
    assert (found.documents, found.blobs) == (13, 11)
    assert seen[-1] == ("blobs", found.blobs, found.blobs)
    assert audit.verify(store, expected_head=found.head).intact
    assert audit.verify(store, expected_head=evidence.GENESIS).intact


# What is true only here and now, and in no event.
LOCAL = ("settings", "leases", "lease_names", "alembic_version")
INDEXES = [table for table in schema.metadata.sorted_tables if table.name not in LOCAL]
COLUMNS = [(table, column) for table in INDEXES for column in table.columns]


@pytest.mark.parametrize(("table", "column"), COLUMNS, ids=[f"{t.name}.{c.name}" for t, c in COLUMNS])
def test_every_altered_cell_is_found(store, anchored, table, column):
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
def test_every_lost_row_is_found(store, anchored, table):
    with store.database.read() as connection:
        rows = list(connection.execute(select(table)))
    for row in rows:
        with store.database.write() as connection:
            connection.execute(table.delete().where(*[c == row._mapping[c.name] for c in table.primary_key]))
        assert not audit.verify(store, anchor=anchored).intact, row
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
            assert audit.verify(store).intact is (field == "time"), (field, junk)


def test_documents_of_the_wrong_shape_are_problems_and_not_crashes(store):
    """Every field that should name something else, in a document that matches its digest."""
    for kind in (k for k in Record.__subclasses__() if k.__module__ == records.__name__):
        for field in (*kind.DOCUMENTS, *kind.BLOBS):
            for junk in [junk for junk in JUNK if junk not in (None, [], {})]:
                body = canonical({"schema": kind.SCHEMA, field: junk})
                with store.database.write() as connection:
                    row = {"digest": digest_bytes(body), "schema": kind.SCHEMA, "body": body}
                    connection.execute(schema.documents.insert().values(**row))
                assert not audit.verify(store).intact, (kind, field, junk)
                execute(store, f"DELETE FROM documents WHERE digest = '{digest_bytes(body)}'")


def test_every_byte_of_every_pack_counts(store):
    """Headers too: from them the index can be rebuilt."""
    for path in sorted(store.packs.root.glob("*.safetensors"), key=lambda path: path.stat().st_size)[:2]:
        pack, good = f"sha256:{path.stem}", path.read_bytes()
        indexed = [location for location in _locations(store) if location.pack == pack]
        for at in range(len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            problems = []
            audit.check_pack(store.packs, pack, indexed, problems.append)
            assert len(problems) == 1, (path, at)
        path.write_bytes(good)
    assert audit.verify(store).intact


def _locations(store):
    with store.database.read() as connection:
        return [location_of(row) for row in connection.execute(select(schema.blobs))]


def test_a_missing_and_a_cut_pack_are_one_problem_each_and_an_unreadable_one_is_none(store, monkeypatch):
    path = sorted(store.packs.root.glob("*.safetensors"))[0]
    good = path.read_bytes()
    for body in (good[:-1], good[:4], b""):
        path.write_bytes(body)
        (problem,) = audit.verify(store).problems
        assert path.stem in problem
    path.unlink()
    (problem,) = audit.verify(store).problems
    assert "the pack is missing" in problem
    path.write_bytes(good)

    def refuse(_locations):
        raise EnvironmentFailure("Input/output error")

    monkeypatch.setattr(store.packs, "views", refuse)
    with pytest.raises(EnvironmentFailure):
        audit.verify(store)


def test_every_damaged_blob_of_a_pack_is_named(store):
    path = max(store.packs.root.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    held = [location for location in _locations(store) if path.stem in location.pack and location.length]
    body = bytearray(path.read_bytes())
    for location in held:
        body[location.offset] ^= 1
    path.write_bytes(body)
    assert audit.verify(store).problem_count == len(held) > 1


def test_a_pack_that_was_repacked_meanwhile_is_no_problem(store, monkeypatch):
    """The audit's snapshot of the index still names the old pack when it is gone."""
    path = sorted(store.packs.root.glob("*.safetensors"))[0]
    old = [location for location in _locations(store) if path.stem in location.pack]
    read = audit._check_packs

    def repack_first(*arguments):
        blobs = [Blob(x.digest, store.packs.read(x), x.dtype, x.shape) for x in old]
        moved = store.packs.write([*blobs, Blob.file(b"another")])
        with store.database.write() as connection:
            index.move(connection, [x for x in moved if x.digest in {y.digest for y in old}])
        store.packs.remove(old[0].pack)
        read(*arguments)

    monkeypatch.setattr(audit, "_check_packs", repack_first)
    assert audit.verify(store).problems == []


# What was given up


def _retire(store, kind, digest):
    with store.transaction("kim", "too old") as tx:
        event = tx.append(kind, digest)
        tx.connection.execute(schema.retired.delete().where(schema.retired.c.digest == digest))
        tx.connection.execute(schema.retired.insert().values(digest=digest, event=event.sequence))


def _restore(store, digest):
    with store.transaction("kim") as tx:
        tx.append("asset.restored", digest)
        tx.connection.execute(schema.retired.delete().where(schema.retired.c.digest == digest))


def _forget_blobs(store, digests):
    with store.database.write() as connection:
        index.forget(connection, digests)


def test_files_may_be_gone_exactly_when_their_asset_was_given_up(store):
    with store.database.read() as connection:
        data = assets.resolve(connection, "dataset", "tickets")
    _forget_blobs(store, data.record.files.values())
    (problem,) = audit.verify(store).problems
    assert data.record.files[ROWS_FILE] in problem and data.digest in problem
    _retire(store, "asset.deleted", data.digest)
    assert audit.verify(store).problems == []


def test_tensors_may_be_gone_exactly_when_all_that_hold_them_were_given_up(store):
    """``law`` is an adapter on ``base``, whose two versions have one content."""
    with store.database.read() as connection:
        base = versions.of_model(connection, "base")
        (law,) = versions.of_model(connection, "law")
        below = versions.content_of(connection, base[0].content)
        adapter = versions.content_of(connection, law.content)
    _retire(store, "version.retired", law.digest)
    assert audit.verify(store).problems == []  # nothing was collected yet
    _forget_blobs(store, {*adapter.tensors.values(), *adapter.files.values()})
    assert audit.verify(store).problems == []
    _forget_blobs(store, {*below.tensors.values(), *below.files.values()})
    gone = audit.verify(store).problem_count
    assert gone
    for version in base:
        _retire(store, "version.retired", version.digest)
    assert audit.verify(store).problems == []


def test_a_content_that_another_sits_on_is_kept(store):
    with store.database.read() as connection:
        base = versions.of_model(connection, "base")
        below = versions.content_of(connection, base[0].content)
    for version in base:
        _retire(store, "version.retired", version.digest)
    _forget_blobs(store, below.tensors.values())
    assert audit.verify(store).problem_count == len(set(below.tensors.values()))


def test_what_was_brought_back_must_be_there(store):
    with store.database.read() as connection:
        data = assets.resolve(connection, "dataset", "tickets")
    _retire(store, "asset.retired", data.digest)
    _retire(store, "asset.retired", data.digest)
    _forget_blobs(store, data.record.files.values())
    assert audit.verify(store).problems == []
    _restore(store, data.digest)
    (problem,) = audit.verify(store).problems
    assert data.record.files[ROWS_FILE] in problem


def test_what_was_deleted_for_good_is_never_brought_back(store):
    """Not even when a rule retires it once more in between."""
    with store.database.read() as connection:
        data = assets.resolve(connection, "dataset", "tickets")
    for kind in ("asset.retired", "asset.deleted", "asset.retired"):
        _retire(store, kind, data.digest)
    before = audit.verify(store)
    assert before.problems == []
    _restore(store, data.digest)
    found = audit.verify(store)
    told = f"event {before.events + 1}: it restores what event {before.events - 1} deleted for good"
    assert told in found.problems and found.first_bad == before.events + 1


# The log itself


def test_what_is_said_twice_is_named(store):
    """An event appended once more, where no table shows it: a replayed approval, a second opening."""
    before = audit.verify(store).events
    with store.database.read() as connection:
        (opened,) = evidence.read(connection, kind="plan.opened")
        added = next(evidence.read(connection, kind="asset.added"))
    for event in (opened, added):
        with store.transaction("kim") as tx:
            tx.append(event.kind, event.subject, **event.data)
    found = audit.verify(store)
    told = sorted(problem.partition(":")[0] for problem in found.problems)
    assert told == [f"event {before + n}" for n in (1, 2)]
    assert found.first_bad == before + 1


def test_a_status_of_a_record_that_is_not_there_is_named(store):
    with store.database.read() as connection:
        (opened,) = evidence.read(connection, kind="plan.opened")
    with store.transaction("kim") as tx:
        tx.append("plan.closed", opened.subject, number=99, result=None)
    (problem,) = audit.verify(store).problems
    assert "there is no plan-99" in problem


def test_a_status_before_the_record_was_opened_is_named(store):
    before = audit.verify(store).events
    plan = Plan(model="base", action="wait", reason="late", signals=[], parent="sha256:0", recipe="sha256:0")
    with store.transaction("kim") as tx:
        tx.append("plan.closed", tx.add_document(plan.document()), number=2, result=None)
        ledger.open_record(tx, "plan", plan, "base", status="closed")
    assert f"event {before + 1}: there is no plan-2 whose status could change" in audit.verify(store).problems


# Aliases: ``base@champion`` is at revision 2, and kim and lee may move it


def _move(store, actor, revision, previous, alias=aliases.CHAMPION):
    """A move that ``aliases.move`` would refuse, in the log and in every table; returns the event's number."""
    line = {"model": "base", "alias": alias}
    with store.transaction(actor) as tx:
        (to, *_) = (version.digest for version in versions.of_model(tx.connection, "base"))
        event = tx.append("alias.moved", to, **line, revision=revision, previous=previous).sequence
        where = (schema.aliases.c.model == "base") & (schema.aliases.c.alias == alias)
        tx.connection.execute(schema.aliases.delete().where(where))
        tx.connection.execute(schema.aliases.insert().values(**line, version=to, revision=revision))
        row = {**line, "revision": revision, "version": to, "previous": previous, "event": event}
        tx.connection.execute(schema.alias_moves.insert().values(**row))
    return event


def _at(store):
    with store.database.read() as connection:
        return aliases.champion(connection, "base").version


@pytest.mark.parametrize("revision", [3, 4, 7])
@pytest.mark.parametrize("honest", [True, False])
def test_a_move_that_does_not_follow_the_one_before_is_named(store, revision, honest):
    event = _move(store, "lee", revision, _at(store) if honest else "sha256:bogus")
    found = audit.verify(store)
    if honest and revision == 3:
        assert found.problems == []
    else:
        (problem,) = found.problems
        assert problem.startswith(f"event {event}: base@champion moves from") and found.first_bad == event
        assert problem.endswith(f"to revision {revision}, and before it is revision 2 at {_at_2(store)}")


def _at_2(store):
    query = select(schema.alias_moves.c.version).where(schema.alias_moves.c.revision == 2)
    with store.database.read() as connection:
        return connection.scalar(query.where(schema.alias_moves.c.model == "base"))


def test_a_first_move_and_moves_out_of_order_are_named(store):
    event = _move(store, "kim", 2, None, alias="canary")
    (problem,) = audit.verify(store).problems
    assert problem.startswith(f"event {event}: base@canary") and problem.endswith("before it is no move")
    _move(store, "kim", 1, None, alias="canary")
    assert audit.verify(store).first_bad == event  # by the numbers in a row, but not by the time


def test_whoever_moves_or_protects_a_protected_alias_must_be_named_by_it(store):
    """At that moment: neither who was allowed before nor who is afterwards."""
    lee = _move(store, "lee", 3, _at(store))
    with store.transaction("kim") as tx:
        aliases.protect(tx, "base", aliases.CHAMPION, ["kim"])
    assert audit.verify(store).problems == []
    late = _move(store, "lee", 4, _at(store))
    (problem,) = audit.verify(store).problems
    assert late > lee
    assert problem == f"event {late}: base@champion was protected from lee, only kim might do this"
    with store.transaction("kim") as tx:
        aliases.protect(tx, "base", aliases.CHAMPION, [])
    _move(store, "eve", 5, _at(store))
    assert audit.verify(store).problems == [problem]


def test_a_protection_by_somebody_it_names_not_is_named(store):
    line = {"model": "base", "alias": aliases.CHAMPION}
    with store.transaction("eve") as tx:
        document = tx.connection.scalar(
            select(schema.models.c.document).where(schema.models.c.name == "base")
        )
        event = tx.append("alias.protected", document, **line, actors=["eve"]).sequence
        tx.connection.execute(schema.alias_actors.delete())
        tx.connection.execute(schema.alias_actors.insert().values(**line, actor="eve"))
    (problem,) = audit.verify(store).problems
    assert problem.startswith(f"event {event}: base@champion was protected from eve, only kim, lee might")


def test_an_event_of_an_unknown_kind_needs_its_subject_and_nothing_else(store):
    with store.transaction("kim") as tx:
        subject = tx.add_document({"schema": "meristem/recipe/v1", "seed": 1})
        tx.append("future.happened", subject, anything=[1])
    assert audit.verify(store).problems == []
    with store.transaction("kim") as tx:
        tx.append("future.happened", "sha256:0")
    found = audit.verify(store)
    (problem,) = found.problems
    assert problem == f"document sha256:0: named by event {found.events} but missing"
    assert found.first_bad == found.events


def test_all_problems_are_counted_and_the_first_thousand_kept(store, monkeypatch):
    monkeypatch.setattr(audit, "KEPT", 3)
    execute(store, "UPDATE events SET kind = 'x'")
    found = audit.verify(store)
    assert found.problem_count == found.events and len(found.problems) == 3 and not found.intact
    assert found.first_bad == 1


def test_a_head_that_is_none_is_refused(store):
    for junk in ("", "sha256:12", "SHA256:" + "0" * 64, "sha256:" + "A" * 64, "0" * 64):
        with pytest.raises(BadInput, match="--head"):
            audit.verify(store, expected_head=junk)


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
    _rewritten(store, lambda events: [event.update(actor="lee") for event in events])
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
    assert any(SECRET.encode() in path.read_bytes() for path in store.packs.root.glob("*.safetensors"))


def test_every_record_says_what_it_reaches():
    """A field that could hold a digest and is in neither list would be lost to audits and to gc."""
    beside = {
        "model", "kind", "name", "facts", "tasks", "code", "note", "details", "action", "reason", "attempt", "criteria",
        "budget", "steps", "tokens", "seconds", "curve", "settings", "summary", "gate", "suite", "outcome", "numbers",
        "needed", "arguments", "champion_revision", "gates", "approvals_needed", "actor", "revision", "engine", "tier",
        "source", "fingerprint", "equal", "difference", "bundle",
        "evidence", "head", "sequence", "retired", "blobs", "packs", "repacked", "leftovers", "folders", "bytes",
    }  # fmt: skip
    for kind in (k for k in Record.__subclasses__() if k.__module__ == records.__name__):
        if kind is records.Model:  # its base is a name
            continue
        assert set(kind.model_fields) - beside == {*kind.DOCUMENTS, *kind.BLOBS}, kind


def test_the_same_audit_of_a_team_store(tmp_path, postgresql_url, s3_url):
    """PostgreSQL sorts, streams and types differently, and remote packs are read in ranges."""
    team = Store(tmp_path / "team", postgresql_url(), s3_url())
    team.database.create()
    models.add(team, "kim", "base", "foundation", str(hf.full(tmp_path / "m")), None)
    models.add(team, "kim", "law", "industrial", None, "base")
    signer = keys.load_or_make(tmp_path / "key.pem", team.root)
    with team.transaction("kim", "naïve") as tx:
        keys.add(tx, signer, None)
        aliases.protect(tx, "base", aliases.CHAMPION, ["kim", "Ägir", "zoe"])
    with team.database.write() as connection:
        anchor = [("anchor:1", checkpoints.sign(connection, signer))]
    honest = audit.verify(team, anchor=anchor)
    assert (honest.problems, honest.anchored.sequence) == ([], honest.events)
    for statement, told in {
        "UPDATE events SET body = body || 'x'::bytea WHERE sequence = 2": "event 2: ",
        "UPDATE alias_actors SET actor = 'eve' WHERE actor = 'zoe'": "alias actor base champion eve",
        "DELETE FROM documents WHERE digest = (SELECT document FROM models LIMIT 1)": "but missing",
        'UPDATE blobs SET "offset" = "offset" + 1': "the index does not say where",
        "DELETE FROM checkpoints": "does not hold this checkpoint",
    }.items():
        with pytest.raises(ZeroDivisionError), team.database.write() as connection:
            connection.exec_driver_sql(statement)
            with _as_if_committed(team, connection):
                assert told in " ".join(audit.verify(team, anchor=anchor).problems), statement
            raise ZeroDivisionError
    team.database.close()


@contextmanager
def _as_if_committed(store, connection):
    """The audit reads through ``connection`` for a while."""
    own, store.database.read = store.database.read, lambda: nullcontext(connection)
    try:
        yield
    finally:
        store.database.read = own
