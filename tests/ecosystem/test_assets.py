"""Assets and records: versions of an asset, numbered records with a status."""

from __future__ import annotations

import pytest

from meristem.ecosystem import assets, ledger
from meristem.ecosystem.records import Asset, Plan, Signal
from meristem.errors import BadInput
from meristem.store.packs import Blob


def add(store, name, text, kind="dataset"):
    body = Blob.file(text.encode())
    stored = store.put([body])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
        return assets.add(tx, Asset(kind=kind, name=name, files={"rows.jsonl": body.digest}))


def resolve(store, reference, kind="dataset"):
    with store.database.read() as connection:
        return assets.resolve(connection, kind, reference)


def test_other_content_is_the_next_version_and_the_same_content_the_same(store):
    first, second = add(store, "tickets", "a"), add(store, "tickets", "b")
    assert [first.label, second.label] == ["tickets@v1", "tickets@v2"]
    assert add(store, "tickets", "a") == first
    assert add(store, "other", "a").label == "other@v1"
    assert add(store, "tickets", "a", kind="suite").label == "tickets@v1"
    assert (
        resolve(store, "tickets") == resolve(store, "tickets@v2") == resolve(store, second.digest) == second
    )
    assert resolve(store, "tickets@v1") == first
    with store.database.read() as connection:
        listed = assets.listed(connection, ["dataset", "suite"])
    assert [(entry.kind, entry.label) for entry in listed] == [
        ("dataset", "other@v1"),
        ("dataset", "tickets@v1"),
        ("dataset", "tickets@v2"),
        ("suite", "tickets@v1"),
    ]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nope", "unknown dataset 'nope'; here: tickets"),
        ("tickets@v7", "dataset 'tickets' has no v7; the newest is v1"),
        ("tickets@champion", "write tickets@v1"),
        ("tickets@v\u00b2", "write tickets@v1"),
        ("tickets@v99999999999999999999", "write tickets@v1"),
        ("sha256:00", "unknown dataset"),
    ],
)
def test_an_unknown_asset_is_refused_with_what_there_is(store, reference, message):
    add(store, "tickets", "a")
    with pytest.raises(BadInput, match=message):
        resolve(store, reference)


def signal(store, model="support", note="", status="pending"):
    with store.transaction("kim") as tx:
        return ledger.open_record(tx, "signal", Signal(kind="drift", model=model, note=note), model, status)


def test_records_are_numbered_found_and_filtered(store):
    first, second = signal(store), signal(store, "tax")
    assert [first.id, second.id] == ["signal-1", "signal-2"]
    with store.transaction("kim") as tx:
        ledger.set_status(tx, first, "planned", "sha256:plan")
    with store.database.read() as connection:
        found = ledger.find(connection, "signal-1")
        assert (found.status, found.result, found.record) == ("planned", "sha256:plan", first.record)
        assert [e.id for e in ledger.entries(connection, "signal", model="tax")] == ["signal-2"]
        assert [e.id for e in ledger.entries(connection, "signal", status="planned")] == ["signal-1"]
        assert ledger.by_digest(connection, "signal", second.digest).id == "signal-2"
        with pytest.raises(BadInput):
            ledger.by_digest(connection, "plan", second.digest)
    assert found.as_(Signal).kind == "drift"
    with pytest.raises(BadInput, match="signal-1 is no plan"):
        found.as_(Plan)


def test_the_same_document_twice_is_two_records(store):
    """Two people may report the same thing."""
    first, second = signal(store, note="slow"), signal(store, note="slow")
    assert (first.digest, first.number, second.number) == (second.digest, 1, 2)
    with store.database.read() as connection:
        assert ledger.by_digest(connection, "signal", first.digest) == second


@pytest.mark.parametrize(
    "name", ["signal", "signal-", "signal-x", "thing-1", "signal-\u00b2", "signal-99999999999999999999"]
)
def test_what_is_no_record_id_is_refused(store, name):
    with store.database.read() as connection, pytest.raises(BadInput, match="not a record id"):
        ledger.find(connection, name)


def test_a_record_that_is_not_there_says_which_are(store):
    with store.database.read() as connection, pytest.raises(BadInput, match="there is no plan yet"):
        ledger.find(connection, "plan-1")
    signal(store)
    with (
        store.database.read() as connection,
        pytest.raises(BadInput, match="no signal-2; the newest is signal-1"),
    ):
        ledger.find(connection, "signal-2")
