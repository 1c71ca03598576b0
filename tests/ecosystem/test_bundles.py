"""Bundles: a version carried to another workspace, and everything that may be wrong with one."""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import shutil
import sqlite3
import threading

import fsspec
import pytest
from sqlalchemy import select
from tests.ecosystem import hf

from meristem.ecosystem import (
    aliases,
    assets,
    audit,
    bundles,
    checkouts,
    deletion,
    gc,
    ledger,
    models,
    retirement,
    versions,
)
from meristem.ecosystem.bundles import arrive, form
from meristem.ecosystem.bundles.place import Folder, place_at
from meristem.ecosystem.records import (
    Approval,
    Asset,
    BundleImport,
    Content,
    Decision,
    Evaluation,
    Release,
    Version,
)
from meristem.errors import BadInput, EnvironmentFailure, StateMoved, Tampered
from meristem.store.canonical import canonical, digest_bytes
from meristem.store.packs import Blob
from meristem.store.schema import assets as asset_table
from meristem.store.schema import blobs, documents, evaluations, events, leases

ROWS = b'{"completion": "7", "id": "a-1", "prompt": "A ash ?", "task": "a"}\n'
FACTS = {"rows": 1, "shape": "prompt", "tasks": {"a": 1}, "bytes": len(ROWS)}


def resolve(store, reference):
    with store.database.read() as connection:
        return versions.resolve(connection, reference)


def add_asset(store, record, *bodies):
    stored = store.put(bodies)
    with store.transaction("kim", "asset") as tx:
        tx.add_blobs(stored)
        return assets.add(tx, record)


def evaluate(store, version, *, suite="suite-1", score=1.0):
    """Results of one item, as the evaluator records them."""
    body = Blob.file(canonical([{"id": "i", "score": score}]))
    record = Evaluation(
        content=version.content,
        suite=suite,
        engine="engine-1",
        settings={},
        results=body.digest,
        summary={"score": score},
    )
    stored = store.put([body])
    key = {"content": record.content, "suite": suite, "engine": "engine-1"}
    with store.transaction("kim", "evaluated") as tx:
        tx.add_blobs(stored)
        digest = tx.add_document(record.document())
        tx.connection.execute(evaluations.insert().values(**key, document=digest, seconds=1.5))
        tx.append("evaluation.recorded", digest, **key, results=body.digest, seconds=1.5)
    return record


def release(store, version):
    """Judge, approve and promote a version, by the records alone."""
    with store.transaction("kim", "released") as tx:
        champion = aliases.champion(tx.connection, version.model)
        found = tx.connection.scalars(
            select(evaluations.c.document).where(evaluations.c.content == version.content)
        )
        policy = tx.add_document({"schema": "meristem/policy/v1", "gates": []})
        decision = Decision(
            model=version.model,
            version=version.digest,
            champion=champion.version,
            champion_revision=champion.revision,
            plan=None,
            policy=policy,
            evaluations=sorted(found),
            gates=[],
            outcome="pass",
            approvals_needed=1,
        )
        ledger.open_record(tx, "decision", decision, version.model, status="pass")
        approval = Approval(decision=decision.digest, actor="ann", reason="fine")
        ledger.open_record(tx, "approval", approval, version.model, status="given")
        moved = aliases.move(tx, version.model, aliases.CHAMPION, version.digest, champion.revision)
        record = Release(
            model=version.model,
            kind="promote",
            version=version.digest,
            previous=champion.version,
            revision=moved.revision,
            decision=decision.digest,
        )
        ledger.open_record(tx, "release", record, version.model, status="done")


def learn(store, parent, *, data, seed, tmp_path, state=b'{"ewc":{}}'):
    """A successor of ``parent`` trained on ``data``, with method state."""
    state = Blob.file(state)
    fisher = Blob.tensor("F32", (2,), secrets.token_bytes(8) if seed is None else bytes([seed] * 8))
    kept = add_asset(
        store,
        Asset(
            kind="method-state",
            name=parent.model,
            files={"state.json": state.digest},
            tensors={"ewc/fisher": fisher.digest},
        ),
        state,
        fisher,
    )
    folder = hf.adapter(tmp_path / secrets.token_hex(4), seed=seed)
    with store.database.read() as connection:
        base = versions.content_of(connection, parent.content).base or parent.content
    from meristem.ecosystem.folders import ingest

    with ingest(folder, base) as (content, bodies):
        stored = store.put(bodies)
        record = Version(
            model=parent.model,
            content=content.digest,
            base=parent.record.base,
            parents=[parent.digest],
            data=[data.digest],
            tasks=["a"],
            assets={"method-state": kept.digest},
        )
        with store.transaction("kim", "trained") as tx:
            tx.add_blobs(stored)
            return versions.create(tx, content, record)


@pytest.fixture
def home(store, add, tmp_path):
    """``law@v2`` on ``base``: trained, evaluated, decided, released; ``law@v3`` is a sibling of it."""
    add("base")
    first = add("law", "industrial", base="base")
    rows = Blob.file(ROWS)
    data = add_asset(
        store, Asset(kind="dataset", name="a", files={"rows.jsonl": rows.digest}, facts=FACTS), rows
    )
    second = learn(store, first, data=data, seed=2, tmp_path=tmp_path)
    evaluate(store, second)
    release(store, second)
    learn(store, first, data=data, seed=3, tmp_path=tmp_path)
    return store


@pytest.fixture
def bundle(home, tmp_path):
    place = tmp_path / "bundle"
    bundles.push(home, resolve(home, "law@v2"), place)
    return place


@pytest.fixture
def other(new_store):
    return new_store("other")


def state(store):
    """Every row of every table and the digest of every file."""
    found = {}
    with sqlite3.connect(store.root / "meristem.db") as connection:
        for (table,) in connection.execute("select name from sqlite_master where type='table'"):
            found[table] = sorted(connection.execute(f"select * from {table}"), key=repr)
    connection.close()
    return found | {name: body for name, body in tree(store.root).items() if "meristem.db" not in name}


def tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors(store, reference):
    version = resolve(store, reference)
    with store.database.read() as connection:
        content = versions.content_of(connection, version.content)
        base = versions.content_of(connection, content.base) if content.base else None
    return content.tensors, content.files, base and (base.tensors, base.files)


def forge(place, change):
    """Rewrite a bundle so that everything in it agrees again: ``change(documents, evidence, manifest)``."""
    read = {name: (place / name).read_bytes().splitlines() for name in (form.DOCUMENTS, form.EVIDENCE)}
    found = {name: [json.loads(line) for line in lines] for name, lines in read.items()}
    manifest = json.loads((place / form.MANIFEST).read_bytes())
    change(found[form.DOCUMENTS], found[form.EVIDENCE], manifest)
    for name, rows in found.items():
        body = form.joined(map(canonical, rows))
        (place / name).write_bytes(body)
        manifest["files"][name] = digest_bytes(body)
    if found[form.DOCUMENTS] != [json.loads(line) for line in read[form.DOCUMENTS]]:
        manifest["documents"] = [digest_bytes(canonical(row)) for row in found[form.DOCUMENTS]]
    (place / form.MANIFEST).write_bytes(form.joined([canonical(manifest)]))


# There and back


@pytest.fixture(params=["folder", "memory", "s3"])
def where(request, tmp_path):
    """An empty place of each kind."""
    if request.param == "folder":
        return str(tmp_path / "place")
    if request.param == "memory":
        return f"memory://{secrets.token_hex(6)}/place"
    return f"{request.getfixturevalue('s3_url')()}/place"


def test_a_version_arrives_with_everything_it_needs(home, other, where, tmp_path):
    version = resolve(home, "law@v2")
    assert bundles.push(home, version, where).written
    assert not bundles.push(home, version, where).written
    got = bundles.pull(other, "lee", where)
    assert (got.version.label, got.label, got.added, got.changed) == ("law@v2", "law@v2", True, True)
    assert got.version == version
    assert tensors(other, "law@v2") == tensors(home, "law@v2")
    for store, name in ((home, "one"), (other, "two")):
        checkouts.export(store, resolve(store, "law@v2"), tmp_path / name / "out")
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    differ = {name for name in one if one[name] != two.get(name)}
    assert differ == {"out/adapter_config.json"}  # it names the folder of its base
    assert {"out/adapter_model.safetensors", "out/base/model.safetensors"} < set(one) == set(two)
    for store in (home, other):
        assert audit.verify(store).problems == []
    before = state(other)
    assert bundles.pull(other, "lee", where).changed is False
    assert state(other) == before


def test_a_bundle_holds_what_its_version_reaches_and_no_more(bundle, home, other):
    bundles.pull(other, "lee", bundle)
    with home.database.read() as connection:
        sibling = versions.resolve(connection, "law@v3")
    with other.database.read() as connection:
        assert [v.label for v in versions.of_model(connection, "law")] == ["law@v1", "law@v2"]
        assert [a.label for a in assets.listed(connection, ["dataset", "method-state"])] == ["a@v1", "law@v1"]
        assert connection.execute(select(evaluations)).one().seconds == 1.5
        assert sibling.content not in set(connection.scalars(select(documents.c.digest)))
        kinds = list(connection.scalars(select(events.c.kind).order_by(events.c.sequence)))
    assert kinds[-1] == "bundle.imported"
    assert "decision.opened" not in kinds  # what was decided there is no decision here


def test_the_foreign_evidence_is_kept_verbatim_and_apart(bundle, home, other):
    got = bundles.pull(other, "lee", bundle)
    with other.database.read() as connection:
        (digest,) = connection.scalars(
            select(documents.c.digest).where(documents.c.schema == BundleImport.SCHEMA)
        )
        report = assets.resolve(connection, "report", "law")
        chain = set(connection.scalars(select(events.c.body)))
    record = BundleImport.from_document(other.document(digest))
    assert (record.bundle, record.version) == (got.bundle, got.version.digest)
    assert record.bundle == digest_bytes((bundle / "bundle.json").read_bytes())
    kept = other.read_blob(record.evidence)
    assert kept == (bundle / "evidence.jsonl").read_bytes()
    assert other.read_blob(report.record.files["bundle.json"]) == (bundle / "bundle.json").read_bytes()
    with home.database.read() as connection:
        theirs = {row.body: (row.kind, row.hash) for row in connection.execute(select(events))}
    carried = [line for line in kept.splitlines() if line in theirs]
    assert {"decision.opened", "approval.opened", "release.opened", "alias.moved", "evaluation.recorded"} <= {
        theirs[line][0] for line in carried
    }
    assert record.head == theirs[carried[-1]][1]
    assert not chain & set(carried)
    schemas = {json.loads(line)["schema"] for line in kept.splitlines()}
    assert {Decision.SCHEMA, Approval.SCHEMA, Release.SCHEMA, "meristem/policy/v1"} <= schemas


def test_new_models_get_their_champions(bundle, other):
    bundles.pull(other, "lee", bundle)
    with other.database.read() as connection:
        assert [
            (m.name, m.tier, m.base, aliases.champion(connection, m.name).version)
            for m in models.all_models(connection)
        ] == [
            ("base", "foundation", None, resolve(other, "base@v1").digest),
            ("law", "industrial", "base", resolve(other, "law@v2").digest),
        ]
        assert aliases.read(connection, "law", aliases.CHALLENGER) is None


def test_a_version_joins_a_line_that_is_here_as_its_challenger(bundle, other, tmp_path):
    models.add(other, "lee", "base", "foundation", str(hf.full(tmp_path / "own", hf.weights(9))), None)
    mine = models.add(other, "lee", "law", "industrial", None, "base")
    got = bundles.pull(other, "lee", bundle)
    assert (got.label, got.version.label) == ("law@v2", "law@v3")  # numbers are local, digests are not
    with other.database.read() as connection:
        assert aliases.champion(connection, "law").version == mine.digest
        challenger = aliases.read(connection, "law", aliases.CHALLENGER)
        assert challenger and challenger.version == got.version.digest
        assert aliases.read(connection, "base", aliases.CHALLENGER) is None
    assert audit.verify(other).problems == []


def test_what_is_here_already_is_not_copied(bundle, home, other, tmp_path):
    models.add(other, "lee", "base", "foundation", str(hf.full(tmp_path / "source-base")), None)
    with other.database.read() as connection:
        before = {row.digest: row.pack for row in connection.execute(select(blobs))}
    bundles.pull(other, "lee", bundle)
    with other.database.read() as connection:
        after = {row.digest: row.pack for row in connection.execute(select(blobs))}
    assert {digest: after[digest] for digest in before} == before
    entries = [x.digest for pack in set(after.values()) for x in other.packs.entries(pack)]
    assert len(entries) == len(set(entries)) == len(after)


def test_an_evaluation_that_is_here_stays(bundle, home, other, tmp_path):
    shutil.copytree(bundle, tmp_path / "first")
    bundles.pull(other, "lee", tmp_path / "first")
    evaluate(home, resolve(home, "law@v2"), suite="suite-2", score=0.0)
    mine = evaluate(other, resolve(other, "law@v2"), suite="suite-2", score=0.5)
    got = bundles.push(home, resolve(home, "law@v2"), tmp_path / "second")
    pulled = bundles.pull(other, "lee", tmp_path / "second")
    assert (pulled.added, pulled.changed, pulled.bundle) == (False, True, got.digest)
    with other.database.read() as connection:
        query = select(evaluations.c.document).where(evaluations.c.suite == "suite-2")
        assert connection.scalar(query) == mine.digest
    assert audit.verify(other).problems == []
    before = state(other)
    assert not bundles.pull(other, "lee", tmp_path / "second").changed
    assert state(other) == before


def test_a_bundle_that_comes_home_changes_nothing(bundle, home):
    before = state(home)
    assert not bundles.pull(home, "kim", bundle).changed
    assert state(home) == before


def test_a_bundle_goes_on_to_a_third_workspace_with_its_whole_history(
    bundle, home, other, new_store, tmp_path
):
    bundles.pull(other, "lee", bundle)
    bundles.push(other, resolve(other, "law"), tmp_path / "next")
    third = new_store("third")
    bundles.pull(third, "max", tmp_path / "next")
    assert tensors(third, "law") == tensors(home, "law@v2")
    with third.database.read() as connection:
        reports = assets.listed(connection, ["report"])
    bodies = [third.read_blob(report.record.files["evidence.jsonl"]) for report in reports]
    assert (bundle / "evidence.jsonl").read_bytes() in bodies  # what the first had recorded
    assert len(bodies) == 2
    assert audit.verify(third).problems == []


def test_blobs_are_moved_in_parts_that_fit_into_memory(home, other, tmp_path, monkeypatch):
    monkeypatch.setattr(form, "AT_ONCE", 100)
    made = bundles.push(home, resolve(home, "law@v2"), tmp_path / "b")
    assert made.packs > 3
    bundles.pull(other, "lee", tmp_path / "b")
    assert tensors(other, "law@v2") == tensors(home, "law@v2")
    with other.database.read() as connection:
        assert connection.execute(select(leases)).all() == []
    assert audit.verify(other).problems == []


# Pushing


def test_the_same_state_is_the_same_bytes(bundle, home, new_store, tmp_path):
    shutil.copytree(home.root, tmp_path / "elsewhere")
    copy = type(home)(tmp_path / "elsewhere")
    bundles.push(copy, resolve(copy, "law@v2"), tmp_path / "again")
    copy.database.close()
    assert tree(tmp_path / "again") == tree(bundle)
    assert all(word not in (bundle / "bundle.json").read_text() for word in ("kim", "time", str(tmp_path)))


def test_pushing_writes_nothing_twice_and_nothing_here(bundle, home):
    def stamps():
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in bundle.rglob("*")}

    before, files = state(home), stamps()
    assert not bundles.push(home, resolve(home, "law@v2"), bundle).written
    assert (state(home), stamps()) == (before, files)
    (pack,) = (bundle / "packs").iterdir()
    pack.write_bytes(pack.read_bytes()[:-1])
    assert bundles.push(home, resolve(home, "law@v2"), bundle).written  # a damaged pack is mended
    assert len(list((bundle / "packs").iterdir())) == 1


def test_a_place_with_anything_else_in_it_is_refused(bundle, home, tmp_path):
    version, before = resolve(home, "law@v2"), tree(bundle)
    with pytest.raises(BadInput, match="another bundle"):
        bundles.push(home, resolve(home, "law@v3"), bundle)
    assert tree(bundle) == before
    for number, name in enumerate(["notes.txt", "packs/other.safetensors", "folder/x"]):
        place = tmp_path / f"place-{number}"
        (place / name).parent.mkdir(parents=True)
        (place / name).write_text("mine")
        with pytest.raises(BadInput, match="no part of this bundle"):
            bundles.push(home, version, place)
        assert list(tree(place)) == [name]
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="this is a file"):
        bundles.push(home, version, tmp_path / "file")
    url = f"memory://{secrets.token_hex(6)}/x"
    fsspec.filesystem("memory").pipe_file(f"{url}/notes.txt", b"mine")
    with pytest.raises(BadInput, match=r"notes\.txt"):
        bundles.push(home, version, url)


@pytest.mark.parametrize("name", ["documents.jsonl", "evidence.jsonl", "bundle.json"])
def test_a_push_that_was_cut_off_is_no_bundle_and_is_finished_by_the_next(
    home, other, tmp_path, monkeypatch, name
):
    place, create = tmp_path / "place", Folder.create

    def cut(self, wanted, data):
        if wanted == name:
            raise KeyboardInterrupt
        return create(self, wanted, data)

    monkeypatch.setattr(Folder, "create", cut)
    with pytest.raises(KeyboardInterrupt):
        bundles.push(home, resolve(home, "law@v2"), place)
    monkeypatch.undo()
    before = state(other)
    with pytest.raises(BadInput, match="not a bundle, or one whose push was cut off"):
        bundles.pull(other, "lee", place)
    assert state(other) == before
    if name != "documents.jsonl":
        with pytest.raises(BadInput, match="unfinished push of something else"):
            bundles.push(home, resolve(home, "law@v3"), place)
    assert bundles.push(home, resolve(home, "law@v2"), place).written
    assert bundles.pull(other, "lee", place).added


@pytest.mark.parametrize("references", [("law@v2", "law@v2"), ("law@v2", "law@v3")])
@pytest.mark.parametrize("place", ["folder", "memory"])
def test_two_pushes_at_once(home, new_store, tmp_path, references, place):
    for turn in range(3):
        where = str(tmp_path / f"{turn}") if place == "folder" else f"memory://{secrets.token_hex(6)}/x"
        start, outcomes = threading.Barrier(2), []

        def push(reference, start=start, where=where, outcomes=outcomes):
            version = resolve(home, reference)
            start.wait()
            try:
                outcomes.append(bundles.push(home, version, where).version.digest)
            except (BadInput, StateMoved):
                outcomes.append(None)

        threads = [threading.Thread(target=push, args=(reference,)) for reference in references]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        won = {digest for digest in outcomes if digest}
        if references[0] == references[1]:
            assert None not in outcomes
        if won:
            (winner,) = won
            assert bundles.pull(new_store(f"{place}-{turn}"), "lee", where).version.digest == winner


def test_a_store_that_lost_bytes_pushes_nothing(home, tmp_path):
    with home.database.write() as connection:
        lost = connection.scalar(select(blobs.c.digest).limit(1))
        connection.execute(blobs.delete().where(blobs.c.digest == lost))
    with pytest.raises(Tampered, match=r"blob sha256:\w+ is not stored"):
        bundles.push(home, resolve(home, "law@v2"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


# Bytes that were given up


def test_a_deleted_data_set_is_absent_and_stays_so(home, other, tmp_path):
    deletion.delete(home, "kim", "a", "on request 7")
    bundles.push(home, resolve(home, "law@v2"), tmp_path / "b")
    assert ROWS not in b"".join(path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file())
    got = bundles.pull(other, "lee", tmp_path / "b")
    (data,) = got.version.record.data
    assert data in json.loads((tmp_path / "b/bundle.json").read_text())["absent"]
    with other.database.read() as connection:
        event = retirement.event_of(connection, data)
    assert event and event.kind == "asset.deleted"
    assert audit.verify(other).problems == []
    before = state(other)
    assert not bundles.pull(other, "lee", tmp_path / "b").changed
    assert state(other) == before


def test_what_was_deleted_here_does_not_come_back(bundle, home, other):
    rows = Blob.file(ROWS)
    add_asset(other, Asset(kind="dataset", name="mine", files={"rows.jsonl": rows.digest}, facts=FACTS), rows)
    deletion.delete(other, "lee", "mine", "on request 8")
    bundles.pull(other, "lee", bundle)  # the same rows under another name
    assert all(ROWS not in path.read_bytes() for path in other.packs.root.glob("*.safetensors"))
    assert audit.verify(other).problems == []
    before = state(other)
    assert not bundles.pull(other, "lee", bundle).changed
    assert state(other) == before


@pytest.mark.parametrize("deleted", ["mine", "a"])
def test_deleted_rows_do_not_come_back_in_a_method_state(home, other, tmp_path, deleted):
    """Whether its rows come along, under another name, or are known by their digest alone."""
    with home.database.read() as connection:
        data = assets.resolve(connection, "dataset", "a")
    held = canonical({"replay": {"rows": [json.loads(ROWS)]}})
    child = learn(home, resolve(home, "law@v2"), data=data, seed=7, tmp_path=tmp_path, state=held)
    bundles.push(home, child, tmp_path / "b")
    rows = Blob.file(ROWS)
    asset = Asset(kind="dataset", name=deleted, files={"rows.jsonl": rows.digest}, facts=FACTS)
    add_asset(other, asset, rows)
    deletion.delete(other, "lee", deleted, "on request 8")
    got = bundles.pull(other, "lee", tmp_path / "b")
    assert got.version.digest == child.digest
    assert all(b"A ash ?" not in path.read_bytes() for path in other.packs.root.glob("*.safetensors"))
    assert retirement_of(other, child.record.assets["method-state"]).kind == "asset.deleted"
    parent = resolve(home, "law@v2").record.assets["method-state"]
    assert retirement_of(other, parent) is None  # it holds no rows
    assert audit.verify(other).problems == []
    before = state(other)
    assert not bundles.pull(other, "lee", tmp_path / "b").changed
    assert state(other) == before


def give_up(store, noun, digest, kind):
    """As gc does, for the blobs that only ``digest`` needs."""
    with store.transaction("kim") as tx:
        retirement.give_up(tx, noun, digest, retirement.RETIRED, "old", label="x", kind=kind)
        found = tx.connection.execute(select(documents.c.body).where(documents.c.digest == digest)).scalar()
        document = json.loads(found)
        content = json.loads(
            tx.connection.execute(
                select(documents.c.body).where(documents.c.digest == document.get("content", digest))
            ).scalar()
        )
        for blob in content["tensors"].values():
            tx.connection.execute(blobs.delete().where(blobs.c.digest == blob))


def test_a_version_whose_bytes_were_given_up_is_not_pushed_but_pulled_back(bundle, home, tmp_path):
    version = resolve(home, "law@v2")
    give_up(home, "version", version.digest, "adapter")
    with pytest.raises(BadInput, match="retired by event"):
        bundles.push(home, version, tmp_path / "b")
    assert bundles.pull(home, "kim", bundle).changed
    assert retirement_of(home, version.digest) is None
    assert audit.verify(home).problems == []
    before = state(home)
    assert not bundles.pull(home, "kim", bundle).changed
    assert state(home) == before


def test_an_ancestor_and_a_method_state_may_be_absent(home, other, tmp_path):
    parent = resolve(home, "law@v2")
    with home.database.read() as connection:
        data = assets.resolve(connection, "dataset", "a")
    child = learn(home, parent, data=data, seed=5, tmp_path=tmp_path)
    give_up(home, "version", parent.digest, "adapter")
    give_up(home, "asset", parent.record.assets["method-state"], "method-state")
    bundles.push(home, child, tmp_path / "b")
    got = bundles.pull(other, "lee", tmp_path / "b")
    assert got.version.digest == child.digest
    assert retirement_of(other, parent.digest) and retirement_of(other, parent.record.assets["method-state"])
    assert audit.verify(other).problems == []


def retirement_of(store, digest):
    with store.database.read() as connection:
        return retirement.event_of(connection, digest)


# What is refused on arrival


def refused(store, place, error=Tampered, match=None):
    before = state(store)
    with pytest.raises(error, match=match) as told:
        bundles.pull(store, "lee", place)
    assert state(store) == before
    assert len(str(told.value).splitlines()) == 1
    return str(told.value)


def test_every_changed_byte_is_found(home, other, tmp_path, monkeypatch):
    monkeypatch.setattr(form, "AT_ONCE", 300)  # several packs
    bundle = tmp_path / "bundle"
    bundles.push(home, resolve(home, "law@v2"), bundle)
    order = random.Random(0)
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        body = path.read_bytes()
        spots = {0, len(body) - 1, *order.sample(range(len(body)), 30)}
        if path.name == "bundle.json":
            spots = set(range(0, len(body), 7))
        for spot in spots:
            changed = bytearray(body)
            changed[spot] ^= order.choice([1, 2, 4, 128])
            path.write_bytes(changed)
            errors = (Tampered, BadInput) if path.name == "bundle.json" else Tampered
            with pytest.raises(errors):
                bundles.pull(other, "lee", bundle)
        path.write_bytes(body)
    assert not other.packs.root.exists()
    assert audit.verify(other).events == 0
    assert bundles.pull(other, "lee", bundle).added


def test_every_missing_or_cut_file_is_found(bundle, other, tmp_path):
    for name in tree(bundle):
        broken = tmp_path / "broken"
        shutil.copytree(bundle, broken)
        (broken / name).unlink()
        error = BadInput if name == "bundle.json" else Tampered
        told = refused(other, broken, error)
        assert name in told or "bundle.json" in told
        for body in (b"", (bundle / name).read_bytes()[:-1], (bundle / name).read_bytes() + b"\n"):
            (broken / name).write_bytes(body)
            refused(other, broken)
        shutil.rmtree(broken)


def test_swapped_packs_and_packs_too_many_or_too_few_are_found(home, other, tmp_path, monkeypatch):
    monkeypatch.setattr(form, "AT_ONCE", 300)
    place = tmp_path / "place"
    bundles.push(home, resolve(home, "law@v2"), place)
    bundles.push(home, resolve(home, "law@v3"), tmp_path / "sibling")
    one, two = sorted((place / "packs").iterdir())[:2]
    ours = {path.name for path in (place / "packs").iterdir()}
    bodies = one.read_bytes(), two.read_bytes()
    one.write_bytes(bodies[1])
    two.write_bytes(bodies[0])
    refused(other, place, match="does not match its name")
    one.write_bytes(bodies[0])
    two.write_bytes(bodies[1])
    name = f"sha256:{one.stem}"
    forge(place, lambda d, e, manifest: manifest["packs"].remove(name))
    refused(other, place, match="no pack holds the blob")
    strangers = {p.name for p in (tmp_path / "sibling/packs").iterdir()} - ours
    assert strangers
    for stranger in strangers:
        shutil.copy(tmp_path / "sibling/packs" / stranger, place / "packs")
    named = [name, *(f"sha256:{stranger[:64]}" for stranger in strangers)]
    forge(place, lambda d, e, manifest: manifest["packs"].extend(named))
    refused(other, place, match="does not belong there")


def _stray(row):
    return lambda documents_, evidence, manifest: documents_.append(row)


def _drop(documents_, evidence, manifest):
    documents_.pop(0)


def _swap(documents_, evidence, manifest):
    documents_[0], documents_[1] = documents_[1], documents_[0]


def _quiet(kind):
    def change(documents_, evidence, manifest):
        keep = [row for row in evidence if row.get("kind") != kind]
        evidence[:] = keep
        last = [row for row in keep if "sequence" in row][-1]
        manifest |= {"sequence": last["sequence"], "head": digest_bytes(canonical(last))}

    return change


def _manifest(**fields):
    return lambda documents_, evidence, manifest: manifest.update(fields)


def _evidence(row):
    return lambda documents_, evidence, manifest: evidence.append(row)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_stray(Content(kind="full", base=None, tensors={}, files={}).document()), "document sha256:"),
        (_stray({"schema": "meristem/policy/v1"}), "document sha256:"),
        (
            _stray(Approval(decision=digest_bytes(b"x"), actor="a", reason="b").document()),
            "no part of a version",
        ),
        (
            _stray(Asset(kind="dataset", name="zz", files={"rows.jsonl": digest_bytes(b"x")}).document()),
            "does not belong",
        ),
        (_stray(Asset(kind="dataset", name="zz", files={"../x": digest_bytes(b"x")}).document()), "plain"),
        (_stray(Asset(kind="dataset", name="../zz", files={}).document()), "name"),
        (_stray(Asset(kind="dataset", name="zz", files={"rows.jsonl": "nothing"}).document()), "digest"),
        (_drop, "which is not here"),
        (_swap, "not in order|does not follow its base"),
        (_quiet("version.created"), "no event version.created"),
        (_quiet("evaluation.recorded"), "no event evaluation.recorded"),
        (_manifest(label="law@v7"), "not called law@v7"),
        (_manifest(head=digest_bytes(b"x")), "does not end with"),
        (_manifest(absent=[digest_bytes(b"x")]), "absent"),
        (_manifest(version=digest_bytes(b"x")), "there is no version"),
        (_manifest(packs=["../../etc/passwd"]), "does not describe a bundle"),
        (_manifest(extra=1), "Extra inputs"),
        (_evidence({"schema": "meristem/policy/v1", "x": 1}), "does not belong to it"),
        (_evidence({"schema": "meristem/event/v1", "sequence": 1}), "stands among the documents"),
    ],
)
def test_a_bundle_that_agrees_with_itself_but_is_no_bundle_is_refused(bundle, other, change, told):
    forge(bundle, change)
    refused(other, bundle, match=told)


def test_what_a_newer_meristem_wrote_is_refused_as_such(bundle, other, tmp_path):
    shutil.copytree(bundle, tmp_path / "copy")
    forge(bundle, _manifest(schema="meristem/bundle/v2"))
    refused(other, bundle, BadInput, "use a Meristem that reads it")
    forge(tmp_path / "copy", _stray({"schema": "meristem/lens/v1"}))
    refused(other, tmp_path / "copy", BadInput, "use a Meristem that reads it")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"files": {"config.json": "f", "pytorch_model.bin": "f"}}, "not a file of a version"),
        ({"files": {"config.json": "f", "adapter_config.json": "f"}}, "not those of a content of kind full"),
        ({"files": {}}, "not those of a content of kind full"),
        ({"files": {"config.json": "t"}}, "stored as something else"),
        ({"tensors": {"a": "f"}}, "stored as something else"),
        ({"tensors": {"__metadata__": "t"}}, "cannot be written"),
    ],
)
def test_a_content_that_no_folder_gives_is_refused(store, add, other, tmp_path, changes, told):
    """A store whose owner wrote what ``ingest`` never would."""
    first = add("base")
    bodies = {"f": Blob.file(b"{}"), "t": Blob.tensor("F32", (1,), b"abcd")}
    fields = {"tensors": {"a": "t"}, "files": {"config.json": "f"}} | changes
    named = {key: {n: bodies[v].digest for n, v in value.items()} for key, value in fields.items()}
    content = Content(kind="full", base=None, **named)
    stored = store.put(bodies.values())
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
        record = Version(model="base", content=content.digest, base=None, parents=[first.digest])
        entry = versions.create(tx, content, record)
    bundles.push(store, entry, tmp_path / "b")
    refused(other, tmp_path / "b", match=told)


def test_a_different_line_of_the_same_name_is_refused(bundle, other, tmp_path):
    models.add(other, "lee", "law", "foundation", str(hf.full(tmp_path / "own")), None)
    told = refused(other, bundle, BadInput, "different lines")
    assert "foundation with no base here and of tier industrial on base in the bundle" in told


def test_a_protected_challenger_is_not_moved_by_others(bundle, other, tmp_path):
    models.add(other, "lee", "base", "foundation", str(hf.full(tmp_path / "own")), None)
    models.add(other, "lee", "law", "industrial", None, "base")
    with other.transaction("ann") as tx:
        aliases.protect(tx, "law", aliases.CHALLENGER, ["ann"])
    refused(other, bundle, BadInput, "is protected")
    assert bundles.pull(other, "ann", bundle).added


def test_what_is_no_bundle_or_cannot_be_read_says_so(other, tmp_path, monkeypatch):
    refused(other, tmp_path / "nowhere", BadInput, "not a bundle")
    (tmp_path / "file").write_text("x")
    refused(other, tmp_path / "file", BadInput, "not a bundle")
    refused(other, f"memory://{secrets.token_hex(6)}", BadInput, "not a bundle")
    refused(other, "nosuch://x/y", BadInput, "nosuch://x/y")
    (tmp_path / "odd/bundle.json").mkdir(parents=True)
    refused(other, tmp_path / "odd", EnvironmentFailure, "Is a directory")


def test_a_server_that_does_not_answer_is_the_environments_failure(home, other, monkeypatch):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    refused(other, "s3://bucket/prefix", EnvironmentFailure, "check the network")
    with pytest.raises(EnvironmentFailure, match="check the network"):
        bundles.push(home, resolve(home, "law@v2"), "s3://bucket/prefix")


def test_a_missing_bucket_is_the_environments_failure(home, s3_url):
    url = s3_url().replace("s3://test-", "s3://nosuch-")
    with pytest.raises(EnvironmentFailure):
        bundles.push(home, resolve(home, "law@v2"), url)


def test_a_file_larger_than_a_bundle_may_have_is_not_read(bundle, other, monkeypatch):
    for name in form.LIMITS:
        monkeypatch.setitem(form.LIMITS, name, 10)
        refused(other, bundle, match="larger than")
        monkeypatch.undo()


def test_bytes_that_change_between_the_check_and_the_copy_are_found(bundle, other, monkeypatch):
    (pack,) = (bundle / "packs").iterdir()
    body = pack.read_bytes()
    real = arrive.read_bundle

    def then_changed(*arguments):
        found = real(*arguments)
        pack.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
        return found

    monkeypatch.setattr(arrive, "read_bundle", then_changed)
    before = state(other)
    with pytest.raises(Tampered):
        bundles.pull(other, "lee", bundle)
    assert state(other) == before


# Interruptions and races


def test_a_pull_that_was_cut_off_leaves_leased_bytes_only(bundle, home, other, monkeypatch):
    def killed(*_):
        raise SystemExit

    before = state(other)
    with monkeypatch.context() as patch:
        patch.setattr(arrive, "_add", killed)
        patch.setattr(arrive.leases, "end", lambda *_: None)  # a killed process gives no lease back
        with pytest.raises(SystemExit):
            bundles.pull(other, "lee", bundle)
    after = state(other)
    changed = {key for key in after if after[key] != before.get(key)}
    changed = {key for key in changed if not key.startswith("packs/")}
    assert changed == {"leases", "lease_names", "settings"}  # settings: the packs now have an owner
    with other.database.write() as connection:
        connection.execute(leases.update().values(expires=0.0))
    gc.collect(other, "lee", {})
    assert not list(other.packs.names())
    assert bundles.pull(other, "lee", bundle).added
    assert tensors(other, "law@v2") == tensors(home, "law@v2")
    assert audit.verify(other).problems == []


def test_two_pulls_at_once_import_once(bundle, other):
    start, outcomes = threading.Barrier(4), []

    def pull():
        start.wait()
        outcomes.append(bundles.pull(other, "lee", bundle).added)

    threads = [threading.Thread(target=pull) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(outcomes) == [False, False, False, True]
    with other.database.read() as connection:
        kinds = list(connection.scalars(select(events.c.kind)))
        assert connection.execute(select(leases)).all() == []
        assert len(connection.execute(select(asset_table)).all()) == 3
    assert kinds.count("bundle.imported") == 1
    assert audit.verify(other).problems == []


def test_a_lease_that_runs_out_stops_the_import(bundle, other):
    other.lease_seconds = 0.0
    with pytest.raises(StateMoved, match="held up for longer than its lease"):
        bundles.pull(other, "lee", bundle)
    with other.database.read() as connection:
        assert connection.execute(select(events)).all() == []


def test_a_file_system_without_hard_links_will_do(home, other, tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("meristem.ecosystem.bundles.place.os.link", no_links)
    place = tmp_path / "place"
    assert bundles.push(home, resolve(home, "law@v2"), place).written
    assert not place_at(place).create("bundle.json", b"x")
    assert bundles.pull(other, "lee", place).added
