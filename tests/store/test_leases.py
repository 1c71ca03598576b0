"""Leases: who stores bytes has them until the transaction that names them, or loses."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
from sqlalchemy import func, select

from meristem.errors import EnvironmentFailure, StateMoved
from meristem.store import leases
from meristem.store.packs import Blob
from meristem.store.schema import blobs, lease_names
from meristem.store.schema import leases as table

ONE, TWO = Blob.file(b"one"), Blob.file(b"two")


def held(store, now=0.0):
    with store.database.read() as connection:
        return leases.held(connection, now)


def count(store):
    with store.database.read() as connection:
        return [connection.scalar(select(func.count()).select_from(t)) for t in (table, lease_names)]


def commit(store, stored):
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)


def test_a_lease_names_new_and_reused_bytes_and_the_pack_until_they_are_named(store):
    commit(store, store.put([ONE]))
    stored = store.put([ONE, TWO])
    assert [place.digest for place in stored.locations] == [TWO.digest]
    assert held(store) == {ONE.digest, TWO.digest, stored.locations[0].pack}
    commit(store, stored)
    assert count(store) == [0, 0]


def test_bytes_that_are_all_there_are_leased_too(store):
    commit(store, store.put([ONE]))
    stored = store.put([ONE])
    assert stored.locations == ()
    assert held(store) == {ONE.digest}
    commit(store, stored)
    assert count(store) == [0, 0]


def test_nothing_stored_needs_no_lease(store):
    stored = store.put([])
    commit(store, stored)
    assert stored.lease is None
    assert count(store) == [0, 0]


def test_the_lease_is_there_before_the_pack(store, monkeypatch):
    inner = type(store.packs).write

    def write(packs, new, progress, salt):
        assert held(store) == {ONE.digest, store.packs.name_of([ONE], salt)}
        return inner(packs, new, progress, salt)

    monkeypatch.setattr(type(store.packs), "write", write)
    store.put([ONE])


def test_a_writer_whose_disk_refuses_gives_its_lease_back(store, monkeypatch):
    def full(*_):
        raise EnvironmentFailure("no space left on device")

    monkeypatch.setattr(type(store.packs), "write", full)
    with pytest.raises(EnvironmentFailure):
        store.put([ONE])
    assert count(store) == [0, 0]


def test_a_writer_past_its_lease_cannot_win_though_nobody_took_anything(store):
    store.lease_seconds = 0.05
    stored = store.put([ONE])
    time.sleep(0.1)
    with pytest.raises(StateMoved, match="longer than its lease"):
        commit(store, stored)
    with store.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(blobs)) == 0


def test_a_lease_is_good_for_one_transaction(store):
    stored = store.put([ONE])
    commit(store, stored)
    with pytest.raises(StateMoved):
        commit(store, stored)


def test_a_transaction_that_fails_keeps_the_lease(store):
    stored = store.put([ONE])
    with pytest.raises(ZeroDivisionError), store.transaction("kim") as tx:
        tx.add_blobs(stored)
        raise ZeroDivisionError
    commit(store, stored)


def slow_writing(monkeypatch, store, seconds):
    inner = type(store.packs).write

    def slow(packs, new, *options):
        time.sleep(seconds)
        return inner(packs, new, *options)

    monkeypatch.setattr(type(store.packs), "write", slow)


def test_writing_for_long_renews_it(store, monkeypatch):
    """The pack takes three leases to write."""
    store.lease_seconds = 0.5
    slow_writing(monkeypatch, store, 1.5)
    commit(store, store.put([ONE]))
    assert store.read_blob(ONE.digest) == b"one"


def test_a_writer_that_was_suspended_while_writing_is_told(store, monkeypatch):
    """Suspended, it renews nothing; what it stored is for gc to take."""
    store.lease_seconds = 0.05
    monkeypatch.setattr(store, "renewed", lambda lease: nullcontext())
    slow_writing(monkeypatch, store, 0.1)
    late = store.put([ONE])
    with pytest.raises(StateMoved, match="longer than its lease"):
        commit(store, late)


def test_a_lease_ends_by_the_clock_and_takes_only_its_own_names(store):
    with store.database.write() as connection:
        leases.take(connection, ["x", "y", "x"], 10.0)
        second = leases.take(connection, ["y", "z"], 20.0)
        assert leases.held(connection, 5.0) == {"x", "y", "z"}
        assert leases.held(connection, 10.0) == {"y", "z"}
        assert [leases.any_expired(connection, now) for now in (9.9, 10.0)] == [False, True]
        assert leases.drop_expired(connection, 10.0) == 1
        assert leases.drop_expired(connection, 10.0) == 0
        leases.renew(connection, second, 15.0, 30.0)
        leases.check(connection, second, 29.0)
        with pytest.raises(StateMoved):
            leases.renew(connection, second, 30.0, 40.0)
        leases.end(connection, second)
        assert leases.held(connection, 0.0) == set()
