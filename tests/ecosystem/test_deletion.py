"""Deletion of a data set on a privacy request: the rows go at once, what learned from them is named."""

from __future__ import annotations

import json

import pytest
from tests.ecosystem import hf
from tests.ecosystem.lines import commit, dataset, row, suite, tree

from meristem.data.datasets import ROWS_FILE
from meristem.ecosystem import assets, audit, deletion, gc, ledger, models
from meristem.ecosystem.records import Asset, Plan, Signal, Update
from meristem.errors import BadInput, EnvironmentFailure, StateMoved
from meristem.store import compaction, evidence, index, leases
from meristem.store.canonical import canonical
from meristem.store.packs import Blob

SECRET = "the customer's private words"


def rows(task, *ids):
    made = [{"id": name, "task": task, "prompt": SECRET, "completion": name} for name in ids]
    return Blob.file("".join(json.dumps(r) + "\n" for r in made).encode())


def data(store, name, task, *ids, **options):
    return dataset(store, name, blob=rows(task, *ids), **options)


def state(store, name, *held, tensors=None):
    """A method state with the exemplars ``held`` (pairs of task and id)."""
    kept = [{"id": i, "task": t, "prompt": SECRET} for t, i in held]
    body = Blob.file(canonical({"experience-replay": {"buffer": {"rows": kept}}, "of": name}))
    stored = store.put([body, *(tensors or {}).values()])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
        named = {key: blob.digest for key, blob in (tensors or {}).items()}
        files = {"state.json": body.digest}
        return assets.add(tx, Asset(kind="method-state", name=name, files=files, tensors=named))


@pytest.fixture
def line(store, add):
    """v2 learned ``tickets``, v3 grew from v2 with ``mail`` and kept rows of both, v4 is none of theirs."""
    v1 = add("base")
    tickets, mail = data(store, "tickets", "a", "1", "2"), data(store, "mail", "b", "1", "2")
    first = state(store, "first", ("a", "1"))
    both = state(store, "both", ("a", "2"), ("b", "1"))
    other = state(store, "other", ("b", "1"))
    v2 = row(store, v1, data=[tickets.digest], assets={"method-state": first.digest})
    v3 = row(store, v2, data=[mail.digest], assets={"method-state": both.digest})
    v4 = row(store, v1, data=[mail.digest], assets={"method-state": other.digest})
    return {"v1": v1, "v2": v2, "v3": v3, "v4": v4, "tickets": tickets, "mail": mail, "both": both}


def bytes_of(store):
    return b"".join(path.read_bytes() for path in store.packs.root.rglob("*"))


def delete(store, name="tickets", reason="request 7"):
    found = deletion.delete(store, "kim", name, reason)
    assert audit.verify(store).problems == []
    return found


def test_rows_go_at_once_and_the_record_stays(store, line):
    body = rows("a", "1", "2").data
    assert bytes(body) in bytes_of(store)
    found = delete(store)
    held = bytes_of(store)
    assert bytes(body) not in held
    assert b'"task":"a"' not in held and b'"task":"b"' in held  # exemplars too, and no others
    assert [e["label"] for e in found.data] == ["tickets@v1"]
    assert [e["label"] for e in found.versions] == ["base@v2", "base@v3"]
    assert [e["label"] for e in found.states] == ["method state of base@v2", "method state of base@v3"]
    with store.database.read() as connection:
        event = next(e for e in evidence.read(connection) if e.sequence == found.data[0]["event"])
    assert (event.kind, event.subject) == ("asset.deleted", line["tickets"].digest)
    assert event.reason == "request 7"
    assert event.data["versions"] == [{"label": f"base@v{n}", "digest": line[f"v{n}"].digest} for n in (2, 3)]
    assert SECRET not in json.dumps(event.data)


def test_a_plain_name_is_every_version_and_one_version_is_one(store, add):
    add("base")
    data(store, "tickets", "a", "1")
    data(store, "tickets", "a", "2")
    assert [e["label"] for e in delete(store, "tickets@v2").data] == ["tickets@v2"]
    with store.database.read() as connection:
        first = assets.resolve(connection, "dataset", "tickets@v1")
    assert store.read_blob(first.record.files[ROWS_FILE])
    data(store, "tickets", "a", "3")
    again = delete(store)
    assert [e["label"] for e in again.data] == ["tickets@v1", "tickets@v2", "tickets@v3"]


def test_a_state_without_its_rows_is_kept_and_said_to_be(store, line):
    found = delete(store, "mail")
    assert [e["label"] for e in found.states] == ["method state of base@v3", "method state of base@v4"]
    assert [e["label"] for e in found.versions] == ["base@v3", "base@v4"]
    with store.database.read() as connection:
        pinned = assets.resolve(connection, "method-state", "first")
    assert store.read_blob(pinned.record.files["state.json"])
    replayed = state(store, "plain", ("z", "1"))
    third = data(store, "third", "c", "1")
    row(store, line["v1"], data=[third.digest], assets={"method-state": replayed.digest})
    found = delete(store, "third")
    assert found.states == []
    assert found.kept == ["method state of base@v5: no row of it found there"]


def test_what_stands_on_a_version_that_learned_it_learned_it_too(store, line, tmp_path):
    from meristem.ecosystem import aliases

    with store.transaction("kim") as tx:
        aliases.move(tx, "base", aliases.CHAMPION, line["v3"].digest, 1)
    models.add(store, "kim", "law", "industrial", str(hf.adapter(tmp_path / "a")), "base")
    found = delete(store)
    assert [e["label"] for e in found.versions] == ["base@v2", "base@v3", "law@v1"]


def test_the_same_bytes_under_another_name_stay_until_that_goes_too(store, line):
    data(store, "copy", "a", "1", "2")
    found = delete(store)
    assert found.kept == ["the rows of tickets@v1: dataset copy@v1 has the same bytes"]
    assert bytes(rows("a", "1", "2").data) in bytes_of(store)
    delete(store, "copy")
    assert bytes(rows("a", "1", "2").data) not in bytes_of(store)


def test_bytes_in_a_second_pack_go_too(store, line):
    """Two writers that raced: the index names one place, another pack holds the same rows."""
    store.packs.write([rows("a", "1", "2"), Blob.file(b"something else")])
    delete(store)
    assert bytes(rows("a", "1", "2").data) not in bytes_of(store)


def test_a_shared_pack_keeps_the_rest(store, line):
    """Weights lie beside the state's exemplars."""
    tensor = Blob.tensor("F32", (2,), b"12345678")
    kept = state(store, "packed", ("c", "1"), tensors={"ewc/w": tensor})
    third = data(store, "third", "c", "1")
    row(store, line["v1"], data=[third.digest], assets={"method-state": kept.digest})
    dataset(store, "named", blob=Blob.file(b"12345678"))
    before = store.location(tensor.digest)
    with store.transaction("kim") as tx:  # another asset names the tensor as well
        assets.add(tx, Asset(kind="method-state", name="same", files={}, tensors={"w": tensor.digest}))
    delete(store, "third")
    assert store.location(tensor.digest).pack != before.pack
    assert store.read_blob(tensor.digest) == b"12345678"
    assert b'"task":"c"' not in bytes_of(store)


@pytest.mark.parametrize(
    ("kind", "status", "remedy"),
    [
        ("update", "interrupted", "update-1 (interrupted): finish it (`meristem update resume update-1`)"),
        ("update", "failed", "or `meristem update close update-1`, then repeat"),
        ("plan", "open", "plan-1 (open): close it with `meristem plan close plan-1`, then repeat"),
        ("signal", "pending", "signal-1 (pending): close it with `meristem signal close signal-1`"),
    ],
)
def test_it_is_refused_while_open_work_uses_it(store, line, kind, status, remedy):
    with store.transaction("kim") as tx:
        recipe = tx.add_document({"schema": "meristem/recipe/v1", "seed": 0})
        work = {
            "model": "base",
            "parent": line["v1"].digest,
            "data": [line["tickets"].digest],
            "recipe": recipe,
        }
        record = {
            "update": Update(**work, method_state=None, code={}),
            "plan": Plan(**work, action="update", reason="", signals=[]),
            "signal": Signal(kind="new-data", model="base", data=work["data"]),
        }[kind]
        entry = ledger.open_record(tx, kind, record, "base")
        if status != "open":
            ledger.set_status(tx, entry, status)
    before = tree(store)
    with pytest.raises(BadInput) as said:
        deletion.delete(store, "kim", "tickets", "request 7")
    assert "data tickets@v1 is used by" in str(said.value)
    assert remedy in str(said.value)
    assert tree(store) == before
    with store.transaction("kim") as tx:
        ledger.set_status(tx, entry, "closed")
    delete(store)


def test_an_open_update_of_a_version_that_learned_it_uses_it(store, line):
    """Its rows are replayed."""
    with store.transaction("kim") as tx:
        recipe = tx.add_document({"schema": "meristem/recipe/v1", "seed": 0})
        work = {"model": "base", "parent": line["v2"].digest, "data": [line["mail"].digest], "recipe": recipe}
        ledger.open_record(tx, "update", Update(**work, method_state=None, code={}), "base")
    with pytest.raises(BadInput, match=r"tickets@v1 is used by update-1"):
        deletion.delete(store, "kim", "tickets", "request 7")


def test_nothing_new_can_name_it(store, line):
    event = delete(store).data[0]["event"]
    said = rf"data tickets@v1 was deleted by event {event} \(request 7\): its bytes are gone"
    signal = Signal(kind="new-data", model="base", data=[line["tickets"].digest])
    with pytest.raises(BadInput, match=said), store.transaction("kim") as tx:
        ledger.open_record(tx, "signal", signal, "base", "pending")
    with pytest.raises(BadInput, match=said):
        data(store, "tickets", "a", "1", "2")
    with pytest.raises(BadInput, match=r"method state of base@v3 was deleted"):
        state(store, "both", ("a", "2"), ("b", "1"))


def test_who_stores_the_same_bytes_now_is_waited_for(store, line):
    store.put([rows("a", "1", "2")])
    before = tree(store)
    with pytest.raises(StateMoved, match="storing the same bytes"):
        deletion.delete(store, "kim", "tickets", "request 7")
    assert tree(store) == before


@pytest.mark.parametrize("reason", ["", "  "])
def test_it_needs_a_reason_and_a_name(store, line, reason):
    with pytest.raises(BadInput, match="needs a reason"):
        deletion.delete(store, "kim", "tickets", reason)
    with pytest.raises(BadInput, match="unknown dataset 'nope'"):
        deletion.delete(store, "kim", "nope", "request 7")


@pytest.mark.parametrize("step", ["repack", "_copy", "remove_unused"])
def test_cut_off_it_is_finished_by_the_same_command(store, line, monkeypatch, step):
    tensor = Blob.tensor("F32", (2,), b"12345678")
    packed = state(store, "packed", ("a", "1"), tensors={"w": tensor})
    row(store, line["v2"], assets={"method-state": packed.digest})
    with store.transaction("kim") as tx:
        assets.add(tx, Asset(kind="method-state", name="same", files={}, tensors={"w": tensor.digest}))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compaction, step, killed)
        with pytest.raises(KeyboardInterrupt):
            deletion.delete(store, "kim", "tickets", "request 7")
    assert audit.verify(store).problems == []
    assert b'"task":"a"' in bytes_of(store)
    events = count(store)
    found = delete(store)
    assert b'"task":"a"' not in bytes_of(store)
    assert count(store) == events  # said once
    assert found.states == []
    assert store.read_blob(tensor.digest) == b"12345678"


def test_a_disk_that_refuses_is_said_and_the_command_repeats(store, line, monkeypatch):
    def refuses(*_):
        raise EnvironmentFailure("read-only")

    with monkeypatch.context() as patched:
        patched.setattr(type(store.packs), "remove", refuses)
        with pytest.raises(EnvironmentFailure):
            deletion.delete(store, "kim", "tickets", "request 7")
    delete(store)
    assert b'"task":"a"' not in bytes_of(store)


def count(store):
    with store.database.read() as connection:
        return evidence.head(connection)[0]


def test_run_folders_that_read_it_go(store, line):
    with store.transaction("kim") as tx:
        recipe = tx.add_document({"schema": "meristem/recipe/v1", "seed": 0})
        for parent, name in (("v1", "tickets"), ("v2", "mail"), ("v1", "mail")):
            work = {"model": "base", "parent": line[parent].digest, "data": [line[name].digest]}
            made = Update(**work, recipe=recipe, method_state=None, code={})
            entry = ledger.open_record(tx, "update", made, "base")
            ledger.set_status(tx, entry, "closed")
    for number in (1, 2, 3):
        (store.root / f"runs/update-{number}").mkdir(parents=True)
    delete(store)
    assert [path.name for path in (store.root / "runs").iterdir()] == ["update-3"]


def test_gc_and_reindex_after_it_change_nothing_more(store, line):
    delete(store)
    suite(store, "core", "items")
    assert not gc.collect(store, "kim", {}).blobs
    assert gc.reindex(store).missing == []
    assert audit.verify(store).problems == []
    commit(store, 9)
    with store.database.read() as connection:
        assert leases.held(connection, 0.0) == set()


def test_a_real_line_trains_on_without_it(grown):
    """``a`` was learned with replay and is deleted: the champion stays, and learns the next data without it."""
    import meristem as ms

    ws = ms.Workspace.open(grown, actor="kim")
    found = ws.delete_data("a", "request 7")
    learned = [e["label"] for e in found.versions]
    assert learned == ["support@v2", "support@v3", "support@v4"]
    assert found.states
    assert b"A ash ?" not in bytes_of(ws.store)
    assert ws.verify().problems == []
    with pytest.raises(BadInput, match=r"data a@v1 was deleted by event \d+ \(request 7\)"):
        ws.update("support", data=["a"])
    with pytest.raises(BadInput, match=r"data a@v1 was deleted by event"):
        ws.signal("new-data", "support", data=["a"])
    made = ws.update("support", data=["b"], methods=["experience-replay:ratio=0.5"])
    assert made.record.method_state is None
    assert ws.verify().problems == []
    assert ws.version("support@champion").label == "support@v2"
    ws.close()


# What might bring rows back, or keep them


def test_the_same_rows_do_not_come_back_under_another_name(store, line):
    delete(store)
    said = r"data tickets@v1 was deleted by event \d+ \(request 7\): its bytes are gone"
    with pytest.raises(BadInput, match=said):
        data(store, "other", "a", "1", "2")
    with store.database.read() as connection, pytest.raises(BadInput, match=said):
        assets.refuse_deleted(connection, Asset(kind="suite", name="x", files=line["tickets"].record.files))


def test_a_namesake_that_stayed_can_be_added_again(store, line):
    kept = data(store, "copy", "a", "1", "2")
    delete(store)
    assert data(store, "copy", "a", "1", "2") == kept


def test_what_writers_left_unfinished_goes_and_live_ones_are_named(store, line):
    lease = leases.new()
    pack = store.packs.name_of([Blob.file(b"large")], lease)
    with store.database.write() as connection:
        leases.take(connection, [pack], store.database.now(connection) + 60, lease)
    for stem in (pack[7:23], "0" * 16):
        (store.packs.root / f".tmp-{stem}-1-00").write_bytes(rows("a", "1").data)
    found = delete(store)
    assert found.kept == [
        f".tmp-{pack[7:23]}-1-00: somebody writes this pack at this moment, and it may hold rows; repeat the command"
    ]
    assert found.unfinished
    assert [name for name, _ in store.packs.leftovers()] == [f".tmp-{pack[7:23]}-1-00"]
    with store.database.write() as connection:
        leases.end(connection, lease)
    assert not delete(store).unfinished
    assert b'"task": "a"' not in bytes_of(store)


def test_a_pack_that_had_to_stay_is_said(store, line, monkeypatch):
    monkeypatch.setattr(compaction, "remove_unused", lambda *_: None)
    found = delete(store)
    assert found.unfinished
    assert all(line.endswith("repeat the command") for line in found.kept)


def test_rows_beside_bytes_that_the_index_lost_stay_until_it_is_mended(store, line):
    beside = Blob.file(b"named, and in the same pack")
    stored = store.put([rows("q", "1"), beside])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
        for name, blob in (("q", rows("q", "1")), ("beside", beside)):
            assets.add(tx, Asset(kind="dataset", name=name, files={ROWS_FILE: blob.digest}))
    with store.database.write() as connection:
        index.forget(connection, [beside.digest])
    found = deletion.delete(store, "kim", "q", "request 9")
    assert found.unfinished and "run `meristem store reindex`" in found.kept[0]
    assert gc.reindex(store).missing == []
    assert not delete(store, "q").unfinished
    assert store.read_blob(beside.digest) == beside.data
    assert b'"task": "q"' not in bytes_of(store)


def test_a_deletion_waits_for_a_packing_of_its_rows(store, monkeypatch):
    """The rows would be copied to a pack that the deletion has not seen."""
    data(store, "tickets", "a", "1", beside=[Blob.file(b"dead" * 1000)])
    write, said = type(store.packs).write, []

    def meanwhile(packs, new, *options):
        with pytest.raises(StateMoved, match="same bytes") as error:
            deletion.delete(store, "kim", "tickets", "request 7")
        said.append(error)
        return write(packs, new, *options)

    with monkeypatch.context() as patched:
        patched.setattr(type(store.packs), "write", meanwhile)
        assert gc.collect(store, "kim", {}).repacked == 1
    assert len(said) == 1
    delete(store)
    assert b'"task": "a"' not in bytes_of(store)
