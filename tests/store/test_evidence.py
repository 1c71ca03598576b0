"""The chain: every changed byte, lost, moved or added event is found; a cut or recomputed log needs a kept head."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from sqlalchemy import delete, select, update

from meristem._version import __version__
from meristem.errors import Tampered
from meristem.store import evidence
from meristem.store.canonical import canonical, digest_bytes
from meristem.store.schema import events


@pytest.fixture
def log(store):
    """Six events."""
    for number in range(6):
        with store.transaction("kim", f"reason {number}") as tx:
            tx.append("test.happened", f"sha256:{number}", number=number)
    return store


def problems(store):
    with store.database.read() as connection:
        return [(link.sequence, link.problem) for link in evidence.check_chain(connection) if link.problem]


def stored(store):
    with store.database.read() as connection:
        return list(connection.execute(select(events).order_by(events.c.sequence)))


def change(store, number, **values):
    with store.database.write() as connection:
        connection.execute(update(events).where(events.c.sequence == number).values(**values))


def insert(store, sequence, body):
    with store.database.write() as connection:
        row = {
            "sequence": sequence,
            "hash": digest_bytes(body),
            "kind": "test.happened",
            "subject": "sha256:x",
        }
        connection.execute(events.insert().values(**row, body=body))


def test_an_event_says_who_what_when_why_and_with_which_tool(log):
    before = datetime.now(UTC)
    with log.transaction("kim", "because") as tx:
        event = tx.append("alias.moved", "sha256:aa", model="m", revision=2)
    fields = json.loads(stored(log)[-1].body)
    assert datetime.fromisoformat(fields.pop("time")) >= before
    assert fields == {
        "schema": "meristem/event/v1",
        "sequence": 7,
        "previous": stored(log)[-2].hash,
        "kind": "alias.moved",
        "actor": "kim",
        "tool": f"meristem {__version__}",
        "subject": "sha256:aa",
        "reason": "because",
        "data": {"model": "m", "revision": 2},
    }
    assert event.hash == digest_bytes(stored(log)[-1].body)


def test_stored_bytes_are_canonical_and_chained(log):
    rows = stored(log)
    assert all(row.body == canonical(json.loads(row.body)) for row in rows)
    assert [json.loads(row.body)["previous"] for row in rows] == [
        evidence.GENESIS,
        *(row.hash for row in rows[:-1]),
    ]
    assert problems(log) == []


def test_reading_starts_after_an_event_and_filters_by_kind(log):
    with log.transaction("lee") as tx:
        tx.append("other.happened", "x")
    with log.database.read() as connection:
        assert [event.sequence for event in evidence.read(connection, after=5)] == [6, 7]
        assert [event.actor for event in evidence.read(connection, kind="other.happened")] == ["lee"]
        assert evidence.head(connection) == (7, stored(log)[-1].hash)


def test_every_byte_of_every_event_counts(log):
    rows = stored(log)
    with log.database.write() as connection:
        for row in rows:
            where = update(events).where(events.c.sequence == row.sequence)
            for at in range(len(row.body)):
                body = row.body[:at] + bytes([row.body[at] ^ 1]) + row.body[at + 1 :]
                connection.execute(where.values(body=body))
                links = list(evidence.check_chain(connection))
                assert [link.sequence for link in links if link.problem] == [row.sequence], at
            connection.execute(where.values(body=row.body))
    assert problems(log) == []


@pytest.mark.parametrize("column", ["hash", "kind", "subject"])
def test_every_column_of_an_event_is_checked(log, column):
    change(log, 3, **{column: "sha256:" + "0" * 63 + "1"})
    assert problems(log)[0][0] == 3


def test_a_deleted_event_is_one_problem(log):
    with log.database.write() as connection:
        connection.execute(delete(events).where(events.c.sequence == 3))
    assert problems(log) == [(3, "missing; the next one in the log is event 4")]


def test_a_deleted_event_shows_even_when_the_rest_is_renumbered(log):
    with log.database.write() as connection:
        connection.execute(delete(events).where(events.c.sequence == 3))
    for sequence in (4, 5, 6):
        change(log, sequence, sequence=sequence - 1)
    assert problems(log)[0][0] == 3


def test_exchanged_events_are_found(log):
    change(log, 2, sequence=99)
    change(log, 3, sequence=2)
    change(log, 99, sequence=3)
    assert [sequence for sequence, _ in problems(log)] == [2, 3, 4]


def test_an_inserted_event_is_found(log):
    fields = json.loads(stored(log)[2].body) | {"sequence": 7, "subject": "sha256:x"}
    insert(log, 7, canonical(fields))
    ((sequence, problem),) = problems(log)
    assert sequence == 7 and "does not follow event 6" in problem


def test_two_events_that_do_not_fit_may_both_be_the_altered_one(log):
    """Whoever alters event 3 with its hash leaves event 4 as the first that does not follow."""
    body = canonical(json.loads(stored(log)[2].body) | {"actor": "eve"})
    change(log, 3, body=body, hash=digest_bytes(body))
    with log.database.read() as connection:
        (broken,) = [link for link in evidence.check_chain(connection) if link.problem]
    assert (broken.sequence, broken.first) == (4, 3)


def test_the_newest_events(log):
    with log.database.read() as connection:
        assert [event.sequence for event in evidence.newest(connection, 2)] == [5, 6]
        assert len(evidence.newest(connection, 100)) == 6
        assert evidence.hash_at(connection, 6) == evidence.head(connection)[1]
        assert evidence.hash_at(connection, 7) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"\xff",
        b"[" * 100_000,
        b'{"schema":"meristem/event/v9"}',
        b'{"schema":"meristem/event/v1"}',
    ],
    ids=["empty", "null", "list", "number", "bytes", "deep", "schema", "fields"],
)
def test_what_is_no_event_is_a_problem_and_not_a_crash(log, body):
    insert(log, 7, body)
    assert [sequence for sequence, _ in problems(log)] == [7]


def test_an_event_turned_into_text_is_still_compared_byte_by_byte(log):
    """SQLite keeps whatever type it is given."""
    with log.database.write() as connection:
        connection.exec_driver_sql("UPDATE events SET body = CAST(body AS TEXT) || ' ' WHERE sequence = 2")
    assert [sequence for sequence, _ in problems(log)] == [2]


def test_an_unknown_schema_is_refused():
    with pytest.raises(Tampered):
        evidence.Event.from_body(b'{"schema":"meristem/event/v2"}')
