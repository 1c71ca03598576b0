"""``store gc``: what nothing needs goes, what anything needs stays, whenever it is cut off and whoever writes."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, update
from tests.ecosystem import hf
from tests.ecosystem.lines import age, commit, dataset, row, suite, tree

from meristem.ecosystem import aliases, assets, audit, checkouts, gc, ledger, models, versions
from meristem.ecosystem.records import Asset, Decision, Evaluation, Plan, Signal, Update
from meristem.errors import BadInput, EnvironmentFailure, StateMoved, Tampered
from meristem.store import compaction, evidence, index, leases, schema
from meristem.store.canonical import canonical, digest_bytes
from meristem.store.packs import OWNER, Blob
from meristem.store.store import Store

ALL = {"adapter": 1, "full": 1, "dataset": 1, "suite": 1, "recipe": 1, "method-state": 1}


@pytest.fixture
def line(store, add):
    """``base``: v1 is the champion, v2 and v3 came after it; each has one tensor of its own. All are old."""
    return [add("base"), commit(store, 2), commit(store, 3)]


@pytest.fixture(autouse=True)
def later(monkeypatch):
    """Everything is ten days old when it is collected."""
    age(monkeypatch, days=10)


def labels(found):
    return {kind: sorted(names) for kind, names in found.retired.items()}


def collect(store, retention=ALL, **options):
    found = gc.collect(store, "kim", retention, **options)
    assert not found.problems
    assert audit.verify(store).problems == []
    return found


def test_what_is_old_and_unused_is_retired_and_its_bytes_go(store, line):
    with store.transaction("kim") as tx:
        aliases.move(tx, "base", "canary", line[2].digest, 0)
        aliases.move(tx, "base", "challenger", line[2].digest, 2)
    before = tree(store)
    told = gc.collect(store, "kim", ALL, dry_run=True)
    assert tree(store) == before
    found = collect(store)
    assert labels(found) == {"full": ["base@v2"]}
    assert (found.blobs, found.packs, found.repacked) == (1, 1, 0)
    assert dataclasses.replace(told, dry_run=False) == found
    with store.database.read() as connection:
        events = list(evidence.read(connection))
        retired = [e for e in events if e.kind == "version.retired"]
        assert [(e.subject, e.reason) for e in retired] == [(line[1].digest, "retention: full 1 days")]
        assert events[-1].kind == "store.collected"
        assert events[-1].data["bytes"] == found.bytes > 0
        assert [v.number for v in versions.of_model(connection, "base")] == [1, 2, 3]


def test_nothing_to_collect_writes_nothing(store, line):
    collect(store, {})
    before = tree(store)
    assert not collect(store, {}).anything
    assert tree(store) == before


def test_young_versions_and_kinds_without_a_rule_are_kept(store, line):
    assert not collect(store, {"full": 11, "adapter": 0, "dataset": 0}).anything


def test_whatever_was_champion_can_be_rolled_back_to_forever(store, line):
    with store.transaction("kim") as tx:
        aliases.move(tx, "base", aliases.CHAMPION, line[1].digest, 1)
        aliases.move(tx, "base", aliases.CHAMPION, line[2].digest, 2)
    assert not collect(store).anything


def test_a_release_keeps_its_versions(store, line):
    with store.transaction("kim") as tx:
        aliases.move(tx, "base", aliases.CHAMPION, line[2].digest, 1)
        aliases.move(tx, "base", aliases.CHAMPION, line[0].digest, 2)
    assert labels(collect(store)) == {"full": ["base@v2"]}


def test_what_a_kept_version_grew_from_is_kept(store, line):
    """v3's parent is v2: the whole closure of an alias stays, data and method state too."""
    data, state = dataset(store, "tickets"), dataset(store, "base", kind="method-state")
    loose = dataset(store, "loose")
    child = row(store, line[1], data=[data.digest], assets={"method-state": state.digest})
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", child.digest)
    found = collect(store)
    assert labels(found) == {"full": ["base@v3"], "dataset": [loose.label]}


def test_a_champion_without_challenger_lets_go_of_both(store, line):
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
    assert labels(collect(store)) == {"full": ["base@v2", "base@v3"]}


@pytest.mark.parametrize(
    ("kind", "status", "kept"),
    [
        ("update", "open", True),
        ("update", "interrupted", True),
        ("update", "failed", True),
        ("update", "done", False),
        ("update", "closed", False),
        ("plan", "open", True),
        ("plan", "manual", True),
        ("plan", "stopped", False),
        ("signal", "pending", True),
        ("signal", "planned", False),
    ],
)
def test_open_work_keeps_what_it_names(store, line, kind, status, kept):
    data = dataset(store, "tickets")
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
        recipe = tx.add_document({"schema": "meristem/recipe/v1", "seed": 0})
        work = {"model": "base", "parent": line[1].digest, "data": [data.digest], "recipe": recipe}
        record = {
            "update": Update(**work, method_state=None, code={}) if kind == "update" else None,
            "plan": Plan(**work, action="update", reason="", signals=[]) if kind == "plan" else None,
            "signal": Signal(kind="new-data", model="base", data=[data.digest]),
        }[kind]
        entry = ledger.open_record(tx, kind, record, "base")
        if status != "open":
            ledger.set_status(tx, entry, status)
    found = labels(collect(store))
    assert ("dataset" not in found) == kept
    if kind != "signal":
        assert ("base@v2" not in found["full"]) == kept


def test_a_manual_plan_is_open_until_its_update_has_run(store, line):
    data = dataset(store, "tickets")
    with store.transaction("kim") as tx:
        recipe = tx.add_document({"schema": "meristem/recipe/v1", "seed": 0})
        work = {"model": "base", "parent": line[0].digest, "data": [data.digest], "recipe": recipe}
        plan = Plan(**work, action="update", reason="", signals=[])
        ledger.open_record(tx, "plan", plan, "base", "manual")
        done = ledger.open_record(tx, "update", Update(**work, method_state=None, code={}), "base")
    assert "dataset" not in collect(store).retired
    with store.transaction("kim") as tx:
        ledger.set_status(tx, done, "done")
    assert labels(collect(store))["dataset"] == ["tickets@v1"]


def decide(store, version, champion, entry, outcome):
    results, made = Blob.file(canonical([version.label])), []
    stored = store.put([results])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
        for content in (version.content, champion.content):
            key = {"content": content, "suite": entry.record.facts["digest"], "engine": "sha256:e"}
            record = Evaluation(**key, settings={}, results=results.digest, summary={})
            made.append(tx.add_document(record.document()))
            row = dict(**key, document=made[-1], seconds=1.0)
            tx.connection.execute(insert(schema.evaluations).values(**row))
            tx.append("evaluation.recorded", made[-1], **key, results=results.digest, seconds=1.0)
        policy = tx.add_document({"schema": "meristem/policy/v1", "gates": [], "approvals": 0})
        decision = Decision(
            model="base",
            version=version.digest,
            champion=champion.digest,
            champion_revision=aliases.champion(tx.connection, "base").revision,
            plan=None,
            policy=policy,
            evaluations=made,
            gates=[],
            outcome=outcome,
            approvals_needed=0,
        )
        ledger.open_record(tx, "decision", decision, "base", outcome)


@pytest.mark.parametrize(("outcome", "kept"), [("pass", True), ("fail", False)])
def test_a_decision_that_can_still_be_promoted_keeps_its_version(store, line, outcome, kept):
    judged = suite(store, "core", "items 1")
    suite(store, "core", "items 2")
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
    decide(store, line[1], line[0], judged, outcome)
    found = labels(collect(store))
    assert ("base@v2" not in found["full"]) == kept
    # Either verdict can still be explained: its suite and its results are there.
    assert "suite" not in found
    with store.transaction("kim") as tx:
        aliases.move(tx, "base", aliases.CHAMPION, line[0].digest, 1)  # the decision is void
    later = labels(collect(store))
    assert ("base@v2" in later.get("full", [])) == kept
    assert "suite" not in later


def test_suites_that_judged_nothing_go_and_the_newest_stays(store, line):
    suite(store, "core", "items 1")
    suite(store, "core", "items 2")
    assert labels(collect(store))["suite"] == ["core@v1"]


def test_shared_bytes_stay_while_anything_names_them(store, add, line):
    """v2 shares two tensors and its files with v1; an adapter on v3 keeps v3's content though v3 is retired."""
    source = hf.adapter(store.root.parent / "adapter")
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
    models.add(store, "kim", "law", "industrial", str(source), "base@v3")
    with (
        store.database.write() as connection
    ):  # as if law had been pinned to v1: only its content sits on v3's
        held = set(connection.scalars(select(schema.blobs.c.digest)))
    found = collect(store)
    assert labels(found) == {"full": ["base@v2"]}
    with store.database.read() as connection:
        left = set(connection.scalars(select(schema.blobs.c.digest)))
        lost = held - left
        own = versions.content_of(connection, line[1].content).tensors["b.weight"]
    assert lost == {own}


def test_the_content_under_a_kept_adapter_stays(store, add, line):
    from meristem.ecosystem.reach import given_up

    models.add(store, "kim", "law", "industrial", str(hf.adapter(store.root.parent / "adapter")), "base@v3")
    with store.database.read() as connection:
        gone = {entry.digest for entry in line}
        assert given_up(connection, gone) == {line[0].content, line[1].content}
        assert given_up(connection, set()) == set()


def test_a_retired_version_is_refused_by_name_and_event(store, line, tmp_path):
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
    collect(store)
    said = r"base@v2 was retired by event \d+ \(retention: full 1 days\): its bytes are gone"
    with pytest.raises(BadInput, match=said):
        checkouts.export(store, line[1], tmp_path / "out")
    with pytest.raises(BadInput, match=said), store.transaction("kim") as tx:
        aliases.point(tx, "base", "canary", line[1].digest)
    with pytest.raises(BadInput, match=said):
        models.add(store, "kim", "law", "industrial", str(hf.adapter(tmp_path / "a")), "base@v2")


def test_what_is_stored_again_is_there_again(store, line, monkeypatch):
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
    collect(store)
    again = commit(store, 2)
    assert again == line[1]
    assert audit.verify(store).problems == []
    checkouts.export(store, again, store.root.parent / "out")
    assert not collect(store).anything  # the challenger points at it
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
    assert labels(collect(store)) == {"full": ["base@v2"]}
    asset = dataset(store, "tickets")
    collect(store)
    assert dataset(store, "tickets") == asset
    assert audit.verify(store).problems == []


def test_a_version_of_bytes_that_are_gone_cannot_be_made(store, line):
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
    collect(store)
    with pytest.raises(StateMoved, match="given up meanwhile"):
        row(store, line[1])


def test_orphan_packs_and_leftovers_of_dead_writers_go(store, line):
    orphan = store.packs.write([Blob.file(b"nobody ever named this")])[0].pack
    store.packs.path(orphan).with_name(".tmp-0123456789abcdef-1-00000000").write_bytes(b"half")
    store.lease_seconds = -1.0  # any age is too old
    told = gc.collect(store, "kim", {}, dry_run=True)
    assert (told.packs, told.leftovers) == (1, 1)
    found = collect(store, {})
    assert (found.packs, found.leftovers) == (1, 1)
    assert orphan not in list(store.packs.names())
    assert list(store.packs.leftovers()) == []


def test_a_live_writer_is_left_alone(store):
    stored = store.put([Blob.file(b"soon named")])
    assert not collect(store, {}).anything
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
    assert store.read_blob(Blob.file(b"soon named").digest) == b"soon named"


def test_a_writer_that_reuses_dead_bytes_keeps_them(store):
    body = Blob.file(b"dead, and wanted again")
    stored = store.put([body])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)  # no document names it
    stored = store.put([body])
    assert not stored.locations
    assert not collect(store, {}).anything
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
    assert collect(store, {}).blobs == 1


def test_a_pack_that_is_mostly_dead_is_written_anew(store):
    named, dead = Blob.file(b"named" * 10), Blob.file(b"dead" * 1000)
    old = dataset(store, "tickets", blob=named, beside=[dead])
    pack = store.location(named.digest).pack
    place = store.location(named.digest)
    assert old.record.files == {"rows.jsonl": named.digest}
    told = gc.collect(store, "kim", {}, dry_run=True)
    found = collect(store, {})
    assert (found.blobs, found.packs, found.repacked) == (told.blobs, told.packs, told.repacked) == (1, 0, 1)
    assert found.bytes >= 4000
    assert pack not in list(store.packs.names())
    with pytest.raises(Tampered):
        store.packs.read(place)
    assert store.read_blob(named.digest) == b"named" * 10
    assert not collect(store, {}).anything


def test_a_pack_that_is_mostly_needed_is_left(store):
    named, dead = Blob.file(b"named" * 1000), Blob.file(b"dead" * 10)
    dataset(store, "tickets", blob=named, beside=[dead])
    found = collect(store, {})
    assert (found.blobs, found.packs, found.repacked) == (1, 0, 0)


def test_a_reader_with_an_old_place_reads_on(store, monkeypatch):
    named = Blob.file(b"named" * 10)
    dataset(store, "tickets", blob=named, beside=[Blob.file(b"dead" * 1000)])
    looked_up = store.location

    def late(digest):
        place = looked_up(digest)
        monkeypatch.setattr(store, "location", looked_up)
        collect(store, {})
        return place

    monkeypatch.setattr(store, "location", late)
    assert store.read_blob(named.digest) == b"named" * 10


def test_damaged_packs_are_left_and_named(store):
    named = Blob.file(b"named" * 10)
    dataset(store, "tickets", blob=named, beside=[Blob.file(b"dead" * 1000)])
    place = store.location(named.digest)
    with store.packs.path(place.pack).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"NAMED")
    found = gc.collect(store, "kim", {})
    assert found.repacked == 0
    assert len(found.problems) == 1 and "do not match" in found.problems[0]
    assert store.location(named.digest) == place


def test_documents_that_cannot_be_read_stop_it_before_anything_goes(store, line):
    with store.database.write() as connection:
        body = canonical({"schema": "meristem/future/v9", "blobs": []})
        values = {"digest": digest_bytes(body), "schema": "meristem/future/v9", "body": body}
        connection.execute(insert(schema.documents).values(**values))
    with pytest.raises(BadInput, match="unknown document schema meristem/future/v9"):
        gc.collect(store, "kim", ALL)
    with store.database.write() as connection:
        table = schema.documents
        connection.execute(table.delete().where(table.c.schema == "meristem/future/v9"))
        where = table.c.digest == line[0].content
        connection.execute(update(table).where(where).values(body=b'{"schema":"meristem/content/v1"}'))
    before = tree(store)
    with pytest.raises(Tampered, match="does not match its digest"):
        gc.collect(store, "kim", ALL)
    assert tree(store) == before


def test_what_comes_into_use_between_the_look_and_the_drop_is_kept(store, line, monkeypatch):
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
    drop = gc._drop

    def late(*arguments):
        with store.transaction("kim") as tx:
            aliases.point(tx, "base", "canary", line[1].digest)
        drop(*arguments)

    monkeypatch.setattr(gc, "_drop", late)
    assert labels(collect(store)) == {"full": ["base@v3"]}
    checkouts.export(store, line[1], store.root.parent / "out")


def test_folders_of_finished_updates_and_retired_contents_go(store, line):
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
        for status in ("done", "open"):
            recipe = tx.add_document({"schema": "meristem/recipe/v1", "seed": 0})
            work = {"model": "base", "parent": line[0].digest, "data": [], "recipe": recipe}
            entry = ledger.open_record(
                tx, "update", Update(**work, method_state=None, code={"x": status}), "base"
            )
            if status == "done":
                ledger.set_status(tx, entry, "done")
    for name in ("update-1", "update-2", "update-7", "notes"):
        (store.root / "runs" / name).mkdir(parents=True)
        (store.root / "runs" / name / "checkpoint").write_text("weights")
        (store.root / "runs" / f"{name}.lock").write_text("1")
    kept = checkouts.cached(store, line[0].content).folder
    gone = checkouts.cached(store, line[1].content).folder
    told = gc.collect(store, "kim", ALL, dry_run=True)
    found = collect(store)
    assert told.folders == found.folders == 5
    left = sorted(path.name for path in (store.root / "runs").iterdir())
    assert left == ["notes", "notes.lock", "update-2", "update-2.lock"]
    assert kept.exists() and not gone.exists()


class Killed(BaseException):
    """A process that ends here."""


def moments(monkeypatch, stop):
    """Count every step of a collection that changes something, and end the process at the ``stop``-th."""
    seen = []

    def counted(owner, name, after):
        inner = getattr(owner, name)

        def step(*arguments, **options):
            if not after:
                seen.append(name)
                if len(seen) == stop:
                    raise Killed
            result = inner(*arguments, **options)
            if after:
                seen.append(name)
                if len(seen) == stop:
                    raise Killed
            return result

        monkeypatch.setattr(owner, name, step)

    from meristem.store import files
    from meristem.store.local_packs import LocalPacks

    for after in (False, True):
        for owner, names in {
            LocalPacks: ("write", "remove", "discard"),
            files: ("sync_folder",),
            index: ("forget", "move"),
            leases: ("take", "end"),
            compaction: ("repack", "remove_unused"),
            evidence: ("append",),
        }.items():
            for name in names:
                counted(owner, name, after)
    return seen


def test_cut_off_anywhere_it_loses_nothing_and_the_rerun_finishes(new_store, tmp_path, monkeypatch):
    origin = new_store("origin")
    models.add(origin, "kim", "base", "foundation", str(hf.full(tmp_path / "m")), None)
    commit(origin, 2)
    commit(origin, 3)
    dataset(origin, "tickets", blob=Blob.file(b"named" * 10), beside=[Blob.file(b"dead" * 1000)])
    origin.packs.write([Blob.file(b"orphan")])
    origin.database.close()

    def copied(name):
        shutil.copytree(origin.root, tmp_path / name)
        return Store(tmp_path / name)

    def indexed(store):
        with store.database.read() as connection:
            return sorted(connection.scalars(select(schema.blobs.c.digest)))

    with monkeypatch.context() as patched:
        seen = moments(patched, -1)
        whole = copied("whole")
        gc.collect(whole, "kim", {"full": 1})
    assert len(seen) > 20
    for stop in range(1, len(seen) + 1):
        store = copied(f"cut-{stop}")
        with monkeypatch.context() as patched:
            moments(patched, stop)
            with pytest.raises(Killed):
                gc.collect(store, "kim", {"full": 1})
        assert audit.verify(store).problems == [], (stop, seen[stop - 1])
        with store.database.write() as connection:
            connection.execute(update(schema.leases).values(expires=0.0))
        gc.collect(store, "kim", {"full": 1})
        assert audit.verify(store).problems == [], (stop, seen[stop - 1])
        assert indexed(store) == indexed(whole)
        assert len(list(store.packs.names())) == 3, (stop, seen[stop - 1])
        store.database.close()
    whole.database.close()


def test_a_full_disk_while_packing_anew_leaves_everything(store, monkeypatch):
    named = Blob.file(b"named" * 10)
    dataset(store, "tickets", blob=named, beside=[Blob.file(b"dead" * 1000)])

    def full(*_):
        raise EnvironmentFailure("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(store.packs), "write", full)
        with pytest.raises(EnvironmentFailure):
            gc.collect(store, "kim", {})
    assert audit.verify(store).problems == []
    with store.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(schema.leases)) == 0
    assert collect(store, {}).repacked == 1


def start(store, *words, lease="60"):
    program = [sys.executable, "-m", "tests.ecosystem.gc_process", str(store.root), lease, *words]
    return subprocess.Popen(
        program, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )


def test_beside_real_writers_nothing_is_lost(store):
    """Two processes write, two collect, all the time."""
    writers = [start(store, "write", name, "25") for name in ("ann", "bob")]
    collectors = [start(store, "gc") for _ in range(2)]
    for process in writers:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    for process in collectors:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    found = audit.verify(store)
    assert found.problems == []
    with store.database.read() as connection:
        listed = assets.listed(connection, ["dataset"])
        assert len(listed) == 50
    for entry in listed:
        name, number = entry.name.split("-")
        assert store.read_blob(entry.record.files["own"]) == f"{name} {number}".encode()
        assert store.read_blob(entry.record.files["shared"]) == f"shared {number}".encode()
    with store.database.write() as connection:
        connection.execute(update(schema.leases).values(expires=0.0))
    collect(store, {})
    with store.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(schema.blobs)) == 75


def test_a_writer_held_up_past_its_lease_finds_its_pack_gone(store):
    store.lease_seconds = 0.2
    body = Blob.file(b"stored, then asleep")
    stored = store.put([body])
    time.sleep(0.3)
    assert collect(store, {}).packs == 1
    with pytest.raises(StateMoved, match="longer than its lease"), store.transaction("kim") as tx:
        tx.add_blobs(stored)
    again = dataset(store, "tickets", blob=body)
    assert store.read_blob(again.record.files["rows.jsonl"]) == b"stored, then asleep"
    assert audit.verify(store).problems == []


def test_the_index_is_made_again_from_the_packs_alone(store, line):
    with store.database.write() as connection:
        before = set(connection.scalars(select(schema.blobs.c.digest)))
        connection.execute(schema.blobs.delete())
    found = gc.reindex(store)
    assert (found.blobs, found.missing) == (len(before), [])
    assert audit.verify(store).problems == []
    lost = store.location(versions_tensor(store, line[2]))
    store.packs.remove(lost.pack)
    assert gc.reindex(store).missing == [lost.digest]


def versions_tensor(store, version):
    with store.database.read() as connection:
        return versions.content_of(connection, version.content).tensors["b.weight"]


# A damaged index, and others at work at the same time


@pytest.mark.parametrize("lost", ["all", "some"])
def test_an_index_that_lost_rows_stops_it_before_anything_goes(store, line, lost):
    with store.database.write() as connection:
        digests = sorted(connection.scalars(select(schema.blobs.c.digest)))
        gone = digests if lost == "all" else digests[:-1]
        connection.execute(schema.blobs.delete().where(schema.blobs.c.digest.in_(gone)))
    before = tree(store)
    for dry_run in (True, False):
        with pytest.raises(Tampered, match="run `meristem store reindex`"):
            gc.collect(store, "kim", ALL, dry_run=dry_run)
    assert tree(store) == before
    assert gc.reindex(store).missing == []
    collect(store, {})


def test_rows_that_are_lost_after_the_look_keep_their_packs(store, line, monkeypatch):
    drop = gc._drop

    def then_lost(*arguments):
        drop(*arguments)
        with store.database.write() as connection:
            connection.execute(schema.blobs.delete())

    monkeypatch.setattr(gc, "_drop", then_lost)
    names = list(store.packs.names())
    found = gc.collect(store, "kim", {})
    assert list(store.packs.names()) == names
    assert len(found.problems) == len(names) and "store reindex" in found.problems[0]
    assert gc.reindex(store).missing == []
    assert audit.verify(store).problems == []


def test_another_collection_meanwhile_is_no_damage(store, line, monkeypatch):
    """What the look still found named was retired, and its row dropped, by somebody else."""
    with store.transaction("kim") as tx:
        aliases.point(tx, "base", "challenger", line[0].digest)
    drop = gc._drop

    def meanwhile(*arguments):
        monkeypatch.setattr(gc, "_drop", drop)
        monkeypatch.setattr(gc, "_compact", lambda *_: None)
        gc.collect(store, "ann", {"full": 1})
        monkeypatch.undo()
        drop(*arguments)

    monkeypatch.setattr(gc, "_drop", meanwhile)
    assert collect(store, {}).packs == 2


def test_packs_that_are_elsewhere_leave_the_index_as_it_is(store, line):
    before = tree(store)
    elsewhere = store.packs.root.with_name("elsewhere")
    store.packs.root.rename(elsewhere)
    with pytest.raises(EnvironmentFailure, match="mend `packs`"):
        gc.reindex(store)
    store.packs.root.mkdir()  # a mount point without its mount
    with pytest.raises(EnvironmentFailure, match="mend `packs`"):
        gc.reindex(store)
    shutil.copy(elsewhere / OWNER, store.packs.root)  # the right place, and no pack in it
    with pytest.raises(EnvironmentFailure, match="mend `packs`"):
        gc.reindex(store)
    shutil.rmtree(store.packs.root)
    elsewhere.rename(store.packs.root)
    assert tree(store) == before


def test_a_removal_that_comes_late_takes_nothing_that_came_after(store):
    """The collector lost its connection, so that its lock is gone; the bytes are stored again before it removes."""
    body = Blob.file(b"stored twice")
    dead = store.put([body])
    with store.database.write() as connection:
        leases.end(connection, dead.lease)
    (orphan,) = store.packs.names()
    again = store.put([body])
    with store.transaction("kim") as tx:
        tx.add_blobs(again)
    store.packs.remove(orphan)
    assert store.read_blob(body.digest) == body.data


def test_what_was_forgotten_while_it_was_copied_leaves_no_copy(store, monkeypatch):
    named, other = Blob.file(b"named" * 10), Blob.file(b"forgotten" * 10)
    dataset(store, "tickets", blob=named, beside=[other, Blob.file(b"dead" * 1000)])
    with store.database.write() as connection:
        index.forget(connection, [Blob.file(b"dead" * 1000).digest])
    pack, write = store.location(named.digest).pack, type(store.packs).write

    def late(packs, new, *options):
        monkeypatch.undo()
        written = write(packs, new, *options)
        with store.database.write() as connection:  # this process was suspended past its lease, and woke up
            index.forget(connection, [other.digest])
        return written

    monkeypatch.setattr(type(store.packs), "write", late)
    assert compaction.repack(store, pack, lambda *_: set())
    assert store.read_blob(named.digest) == named.data
    assert all(b"forgotten" not in path.read_bytes() for path in store.packs.root.glob("*.safetensors"))


def test_what_is_being_packed_anew_cannot_be_dropped(store, monkeypatch):
    """Places are read and leased in one transaction."""
    named = Blob.file(b"named" * 10)
    dataset(store, "tickets", blob=named, beside=[Blob.file(b"dead" * 1000)])
    seen, write = [], type(store.packs).write

    def look(packs, new, *options):
        with store.database.read() as connection:
            seen.append(leases.held(connection, store.database.now(connection)))
        return write(packs, new, *options)

    monkeypatch.setattr(type(store.packs), "write", look)
    collect(store, {})
    assert seen == [{named.digest, store.location(named.digest).pack}]


def test_a_copy_that_comes_past_its_lease_goes_again(store, monkeypatch):
    named = Blob.file(b"named" * 10)
    dataset(store, "tickets", blob=named, beside=[Blob.file(b"dead" * 1000)])
    with store.database.write() as connection:
        index.forget(connection, [Blob.file(b"dead" * 1000).digest])
    before, write = list(store.packs.names()), type(store.packs).write

    def slow(packs, new, *options):
        written = write(packs, new, *options)
        with store.database.write() as connection:
            connection.execute(update(schema.leases).values(expires=0.0))
        return written

    monkeypatch.setattr(type(store.packs), "write", slow)
    with pytest.raises(StateMoved):
        compaction.repack(store, before[0], lambda *_: set())
    assert list(store.packs.names()) == before


def test_a_pack_is_written_anew_in_parts_that_fit_into_memory(store, monkeypatch):
    monkeypatch.setattr(compaction, "AT_ONCE", 100)
    named = [Blob.file(bytes([i]) * 60) for i in range(4)]
    stored = store.put([*named, Blob.file(b"dead" * 1000)])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
        for number, blob in enumerate(named):
            assets.add(tx, Asset(kind="dataset", name=f"d{number}", files={"rows.jsonl": blob.digest}))
    assert collect(store, {}).repacked == 1
    assert len(list(store.packs.names())) == 4
    assert [store.read_blob(blob.digest) for blob in named] == [blob.data for blob in named]
    assert not collect(store, {}).anything


def test_what_a_live_writer_has_not_finished_is_left(store):
    """An upload counts its age from its beginning, and may take longer than a lease that is renewed."""
    lease = leases.new()
    pack = store.packs.name_of([Blob.file(b"large")], lease)
    with store.database.write() as connection:
        leases.take(connection, [pack], store.database.now(connection) + 60, lease)
    store.packs.root.mkdir(parents=True)
    for stem in (pack[7:23], "0" * 16):
        (store.packs.root / f".tmp-{stem}-1-00").write_bytes(b"half")
    store.lease_seconds = -1.0  # any age is too old
    assert gc.collect(store, "kim", {}, dry_run=True).leftovers == 1
    assert collect(store, {}).leftovers == 1
    assert [name for name, _ in store.packs.leftovers()] == [f".tmp-{pack[7:23]}-1-00"]


def test_a_pack_that_another_collection_took_is_no_problem(store, line, monkeypatch):
    orphan = store.packs.write([Blob.file(b"orphan")])[0].pack
    inner = type(store.packs).size

    def late(packs, pack):
        if pack == orphan:
            packs.remove(pack)
        return inner(packs, pack)

    monkeypatch.setattr(type(store.packs), "size", late)
    assert not collect(store, {}).problems
