"""What every database back end must keep, as tests: subclass ``DatabaseContract`` and give it ``open_store``.

::

    class TestMyDatabase(DatabaseContract):
        @pytest.fixture
        def open_store(self, tmp_path): ...
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, select

from meristem.errors import BadInput, StateMoved, Tampered
from meristem.store import evidence
from meristem.store.schema import alias_moves, blobs, documents, events, schema_revision, settings
from meristem.store.store import Store, read_document
from meristem.testing.values import file, tensor

DOCUMENT = {"schema": "meristem/test/v1", "text": "hello"}
Place = tuple[str, str | None, str | None]  # what ``Store`` is made from: root, database, packs
_ALIASES: dict[str, Any] = {"model": "m", "alias": "a", "previous": None}


def contents(store: Store) -> list[list[Any]]:
    with store.database.read() as connection:
        return [sorted(map(tuple, connection.execute(select(t)))) for t in (documents, events, blobs)]


class DatabaseContract:
    """``open_store()`` gives a new handle on one empty workspace; ``place`` says where other processes find it."""

    @pytest.fixture
    def open_store(self) -> Iterator[Callable[[], Store]]:
        raise NotImplementedError

    def place(self, store: Store) -> Place:
        raise NotImplementedError

    @pytest.fixture
    def store(self, open_store: Callable[[], Store]) -> Store:
        return open_store()

    @pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_whatever_stops_a_transaction_takes_all_of_it_back(
        self, store: Store, stop: type[BaseException]
    ) -> None:
        with store.transaction("kim") as tx:
            tx.append("test.began", tx.add_document({**DOCUMENT, "text": "before"}))
        before, stored = contents(store), store.put([tensor(1.0)])
        with pytest.raises(stop), store.transaction("kim") as tx:
            tx.add_blobs(stored)
            tx.append("test.happened", tx.add_document(DOCUMENT))
            raise stop
        assert contents(store) == before
        with store.transaction("kim") as tx:
            assert tx.append("test.happened", "x").sequence == 2

    def test_a_commit_is_seen_by_everybody(self, store: Store, open_store: Callable[[], Store]) -> None:
        other = open_store()
        with store.transaction("kim") as tx:
            digest = tx.add_document(DOCUMENT)
            tx.append("test.happened", digest)
        assert other.document(digest) == DOCUMENT
        assert contents(other) == contents(store)

    def test_a_reader_sees_one_snapshot_and_keeps_nobody_waiting(
        self, store: Store, open_store: Callable[[], Store]
    ) -> None:
        writer = open_store()
        writer.database.busy_seconds = 0.5
        with store.database.read() as connection:
            assert evidence.head(connection) == (0, evidence.GENESIS)
            with writer.transaction("kim") as tx:
                tx.append("test.happened", "x")
            assert evidence.head(connection) == (0, evidence.GENESIS)
        with store.database.read() as connection:
            assert evidence.head(connection)[0] == 1

    def test_a_writer_keeps_no_reader_waiting(self, store: Store, open_store: Callable[[], Store]) -> None:
        other = open_store()
        with store.transaction("kim") as tx:
            tx.append("test.happened", "x")
            assert contents(other)[1] == []

    def test_a_second_writer_is_told_after_a_while(
        self, store: Store, open_store: Callable[[], Store]
    ) -> None:
        other = open_store()
        other.database.close()
        other.database.busy_seconds = 0.2
        refused = pytest.raises(StateMoved, match="another process is writing")
        with store.transaction("kim"), refused, other.transaction("lee"):
            pass
        with other.transaction("lee") as tx:
            tx.append("test.happened", "x")

    def test_a_second_writer_waits_its_turn(self, store: Store, open_store: Callable[[], Store]) -> None:
        other, begun = open_store(), threading.Event()

        def write() -> None:
            begun.set()
            with other.transaction("lee") as tx:
                tx.append("test.happened", "x")

        thread = threading.Thread(target=write)
        with store.transaction("kim") as tx:
            thread.start()
            begun.wait()
            tx.append("test.happened", "x")
        thread.join()
        with store.database.read() as connection:
            assert [event.actor for event in evidence.read(connection)] == ["kim", "lee"]

    def test_tables_are_made_once(self, store: Store, open_store: Callable[[], Store]) -> None:
        with pytest.raises(StateMoved, match="another process"):
            open_store().database.create()

    def test_other_schemas_are_refused_and_say_what_to_do(self, store: Store) -> None:
        store.database.check_schema()
        for revision, remedy in [("0001", "store migrate"), ("0099", "matching release"), ("x", "matching")]:
            with store.database.write() as connection:
                connection.execute(schema_revision.update().values(version_num=revision))
            with pytest.raises(BadInput, match=remedy):
                store.database.check_schema()
        with pytest.raises(BadInput, match="newer"):
            store.database.migrate("kim")

    def test_numbers_bytes_and_text_come_back_as_they_went_in(self, store: Store) -> None:
        words = ["a", "B", "b", "A", "é", "_", "ab", "a b", "Ω", "z", "0", "-"]
        with store.database.write() as connection:
            connection.execute(insert(settings), [{"key": word, "value": word} for word in words])
            move = {**_ALIASES, "revision": 1, "version": "v", "event": 2**63 - 1}
            connection.execute(insert(alias_moves).values(**move))
            connection.execute(insert(documents).values(digest="d", schema="s", body=bytes(range(256))))
        with store.database.read() as connection:
            assert list(
                connection.scalars(select(settings.c.key).where(settings.c.key.in_(words)).order_by("key"))
            ) == sorted(words)
            assert connection.scalar(select(alias_moves.c.event)) == 2**63 - 1
            assert connection.scalar(select(documents.c.body)) == bytes(range(256))

    def test_a_document_is_stored_once_and_checked_when_read(self, store: Store) -> None:
        with store.transaction("kim") as tx:
            digest = tx.add_document(DOCUMENT)
            assert tx.add_document(dict(reversed(DOCUMENT.items()))) == digest
        assert store.document(digest) == DOCUMENT
        with store.database.read() as connection, pytest.raises(BadInput, match="holds no document"):
            read_document(connection, "sha256:0")
        with store.database.write() as connection:
            connection.execute(
                documents.update().values(body=b'{"schema":"meristem/test/v1","text":"hallo"}')
            )
        with pytest.raises(Tampered):
            store.document(digest)

    def test_a_writer_held_up_past_its_lease_cannot_win(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        late, now = store.put([tensor(1.0)]), store.database.now
        with monkeypatch.context() as later:
            later.setattr(store.database, "now", lambda connection: now(connection) + store.lease_seconds)
            with pytest.raises(StateMoved, match="lease"), store.transaction("kim") as tx:
                tx.add_blobs(late)
        with store.transaction("kim") as tx:
            tx.add_blobs(late)
        with pytest.raises(StateMoved, match="lease"), store.transaction("kim") as tx:
            tx.add_blobs(late)  # it ended with the first commit

    def test_the_index_is_made_again_from_the_packs(self, store: Store) -> None:
        for group in ([tensor(1.0), file(b"one")], [tensor(2.0), tensor(1.0)]):
            stored = store.put(group)
            with store.transaction("kim") as tx:
                tx.add_blobs(stored)
        before = contents(store)
        with store.database.write() as connection:
            connection.execute(delete(blobs))
        assert store.rebuild_index() == (2, 3)
        assert contents(store) == before

    @pytest.mark.parametrize("size", [1, 500])
    def test_a_kill_in_the_middle_of_a_transaction_leaves_the_old_state(
        self, store: Store, size: int
    ) -> None:
        with store.transaction("kim") as tx:
            tx.append("test.began", "x")
        before = contents(store)
        killed = spawned(_killed, self.place(store), size)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert contents(store) == before
        with store.transaction("kim") as tx:
            assert tx.append("test.happened", "x").sequence == 2

    def test_many_writers_make_one_chain(self, store: Store) -> None:
        writers = [spawned(_append, self.place(store), 20) for _ in range(4)]
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * 4
        with store.database.read() as connection:
            assert [event.sequence for event in evidence.read(connection)] == list(range(1, 81))
            assert not [link for link in evidence.check_chain(connection) if link.problem]


def spawned(work: Callable[..., None], place: Place, *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=work, args=(place, *arguments))
    process.start()
    return process


def opened(place: Place) -> Store:
    root, database, packs = place
    return Store(Path(root), database, packs)


def _killed(place: Place, size: int) -> None:
    with opened(place).transaction("kim") as tx:
        for _ in range(size):
            tx.append("test.happened", "x", filler="x" * 4000)
        os.kill(os.getpid(), signal.SIGKILL)


def _append(place: Place, count: int) -> None:
    store = opened(place)
    for _ in range(count):
        with store.transaction(f"writer-{os.getpid()}") as tx:
            tx.append("test.happened", "x")
    store.database.close()
