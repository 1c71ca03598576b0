"""What reaches what: the graph that decides what may go."""

from __future__ import annotations

import pytest
from sqlalchemy import update
from tests.ecosystem import hf
from tests.ecosystem.lines import commit, dataset, row, suite

from meristem.ecosystem import models, reach, retirement
from meristem.ecosystem.reach import Reach
from meristem.ecosystem.records import Evaluation, Signal
from meristem.errors import BadInput, Tampered
from meristem.store import evidence, schema


@pytest.fixture
def line(store, add):
    return [add("base"), commit(store, 2), commit(store, 3)]


@pytest.fixture
def connection(store, line):
    with store.database.read() as connection:
        yield connection


def test_a_closure_is_everything_below(store, line):
    data = dataset(store, "tickets")
    child = row(store, line[1], data=[data.digest])
    with store.database.read() as connection:
        found = Reach(connection).closure([child.digest])
    below = {child.digest, data.digest, *(v.digest for v in line[:2]), *(v.content for v in line[:2])}
    assert found == below


def test_an_evaluation_reaches_every_suite_with_its_items(store, line):
    first, twin = suite(store, "core", "items"), suite(store, "same", "items")
    suite(store, "other", "others")
    fields = {"engine": "e", "settings": {}, "results": "sha256:r", "summary": {}}
    record = Evaluation(content=line[0].content, suite=first.record.facts["digest"], **fields)
    with store.transaction("kim") as tx:
        digest = tx.add_document(record.document())
    with store.database.read() as connection:
        found = Reach(connection).closure([digest])
    assert found == {digest, line[0].content, first.digest, twin.digest}


def test_since_sees_what_later_events_are_about(store, line):
    with store.database.read() as connection:
        sequence, _ = evidence.head(connection)
        assert Reach(connection).since(sequence) == set()
    data = dataset(store, "tickets")
    with store.database.read() as connection:
        assert Reach(connection).since(sequence) == {data.digest}
        assert reach.blobs_of(connection, [data.digest]) == set(data.record.files.values())


def test_a_missing_or_altered_document_stops_whoever_decides_what_may_go(store, line, connection):
    with pytest.raises(Tampered, match="is missing"):
        Reach(connection).closure(["sha256:nowhere"])
    table = schema.documents
    with store.database.write() as writing:
        writing.execute(update(table).where(table.c.digest == line[0].digest).values(body=b"{}"))
    with store.database.read() as fresh, pytest.raises(Tampered, match="does not match its digest"):
        Reach(fresh).in_use()


def test_learners_are_those_trained_on_it_and_all_that_grew_from_them(store, line, add):
    data, other = dataset(store, "tickets"), dataset(store, "mail")
    first = row(store, line[0], data=[data.digest])
    grown = row(store, first, data=[other.digest])
    beside = row(store, line[0], data=[other.digest])
    with store.database.read() as connection:
        assert reach.learners(connection, {data.digest}) == {first.digest, grown.digest}
        assert reach.learners(connection, {other.digest}) == {grown.digest, beside.digest}
        assert reach.learners(connection, set()) == set()


def test_a_content_is_given_up_with_its_last_version(store, line):
    twin = row(store, line[1])
    with store.database.read() as connection:
        assert reach.given_up(connection, {line[1].digest}) == set()
        assert reach.given_up(connection, {line[1].digest, twin.digest}) == {line[1].content}
        named = set(reach.named_blobs(connection, {line[1].content}))
        every = set(reach.named_blobs(connection, set()))
    assert len(every - named) == 1  # its other tensors are those of its siblings


def test_a_base_is_kept_by_any_adapter_on_it(store, line, tmp_path):
    law = models.add(store, "kim", "law", "industrial", str(hf.adapter(tmp_path / "a")), "base@v2")
    with store.database.read() as connection:
        assert reach.given_up(connection, {line[1].digest}) == set()
        assert reach.given_up(connection, {line[1].digest, law.digest}) == {line[1].content, law.content}


def test_what_is_given_up_is_refused_and_can_come_back_unless_deleted(store, line):
    data = dataset(store, "tickets")
    with store.transaction("kim") as tx:
        retirement.give_up(tx, "asset", data.digest, "retired", "a rule", label=data.label, kind="dataset")
        assert retirement.all_given_up(tx.connection) == {data.digest}
        assert retirement.all_deleted(tx.connection) == set()
        with pytest.raises(BadInput, match=r"data tickets@v1 was retired by event \d+ \(a rule\)"):
            retirement.refuse(tx.connection, line[0].digest, data.digest)
        retirement.restore(tx, "asset", data.digest)
        retirement.restore(tx, "asset", data.digest)
        retirement.refuse(tx.connection, data.digest)
        retirement.give_up(tx, "asset", data.digest, "deleted", "request", label=data.label, kind="dataset")
        assert retirement.all_deleted(tx.connection) == {data.digest}
        with pytest.raises(BadInput, match=r"data tickets@v1 was deleted by event"):
            retirement.restore(tx, "asset", data.digest)


def test_a_record_that_names_what_is_gone_is_refused(store, line):
    from meristem.ecosystem import ledger

    data = dataset(store, "tickets")
    signal = Signal(kind="new-data", model="base", data=[data.digest])
    with store.transaction("kim") as tx:
        retirement.give_up(tx, "asset", data.digest, "retired", "a rule", label=data.label, kind="dataset")
        with pytest.raises(BadInput, match="was retired"):
            ledger.open_record(tx, "signal", signal, "base")
