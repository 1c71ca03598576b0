"""Transactions: all or nothing, one writer at a time, and every failure with the right exit code."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select
from tests.store.values import tensor

from meristem.errors import BadInput, EnvironmentFailure, StateMoved, Tampered
from meristem.store import database as room
from meristem.store import evidence
from meristem.store.schema import blobs, documents, events, settings
from meristem.store.store import Store, read_document

DOCUMENT = {"schema": "meristem/test/v1", "text": "hello"}


def contents(store):
    with store.database.read() as connection:
        return [list(connection.execute(select(table))) for table in (documents, events, blobs)]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_whatever_stops_a_transaction_takes_all_of_it_back(store, stop):
    with store.transaction("kim") as tx:
        tx.append("test.began", tx.add_document({**DOCUMENT, "text": "before"}))
    before = contents(store)
    with pytest.raises(stop), store.transaction("kim") as tx:
        tx.add_blobs(store.packs.write([tensor(1.0)]))
        tx.append("test.happened", tx.add_document(DOCUMENT))
        raise stop
    assert contents(store) == before
    with store.transaction("kim") as tx:
        assert tx.append("test.happened", "x").sequence == 2


def test_a_reader_sees_one_snapshot(store):
    with store.database.read() as connection:
        assert evidence.head(connection) == (0, evidence.GENESIS)
        with store.transaction("kim") as tx:
            tx.append("test.happened", "x")
        assert evidence.head(connection) == (0, evidence.GENESIS)
    with store.database.read() as connection:
        assert evidence.head(connection)[0] == 1


def test_commits_are_synced(store):
    with store.database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_a_document_is_stored_once_and_checked_when_read(store):
    with store.transaction("kim") as tx:
        digest = tx.add_document(DOCUMENT)
        assert tx.add_document(dict(reversed(DOCUMENT.items()))) == digest
    assert store.document(digest) == DOCUMENT
    with store.database.read() as connection, pytest.raises(BadInput, match="holds no document"):
        read_document(connection, "sha256:0")
    with store.database.write() as connection:
        connection.execute(documents.update().values(body=b'{"schema":"meristem/test/v1","text":"hallo"}'))
    with pytest.raises(Tampered):
        store.document(digest)


@pytest.mark.parametrize("text", ["\udcff", float("nan"), 2**60])
def test_what_json_cannot_carry_is_bad_input_and_changes_nothing(store, text):
    """A note typed in another encoding reaches Python as a lone surrogate."""
    with pytest.raises(BadInput, match="cannot be stored"), store.transaction("kim") as tx:
        tx.add_document({**DOCUMENT, "text": text})
    with pytest.raises(BadInput, match="cannot be stored"), store.transaction("kim") as tx:
        tx.append("test.happened", "x", text=text)
    assert contents(store) == [[], [], []]


def test_a_held_lock_is_state_moved(store, monkeypatch):
    monkeypatch.setattr(room, "BUSY_SECONDS", 0.1)
    other = Store(store.root)
    with (
        store.transaction("kim"),
        pytest.raises(StateMoved, match="another process is writing"),
        other.transaction("lee"),
    ):
        pass
    with other.transaction("lee") as tx:
        tx.append("test.happened", "x")
    other.database.close()


def test_another_schema_is_refused(store):
    store.database.check_schema()
    with store.database.write() as connection:
        connection.execute(settings.update().values(value="99"))
    with pytest.raises(BadInput, match="schema 99"):
        store.database.check_schema()


def test_tables_are_made_once(store):
    with pytest.raises(StateMoved, match="another process made"):
        Store(store.root).database.create()


@pytest.mark.parametrize("body", [b"", b"not a database at all" * 50, "cut", "zeroed"])
def test_a_file_that_is_no_database_of_ours_is_an_environment_failure(store, body):
    store.database.close()
    whole = store.database.path.read_bytes()
    if body == "cut":
        body = whole[:5000]
    elif body == "zeroed":
        body = whole[:100] + bytes(4000) + whole[4100:]
    store.database.path.write_bytes(body)
    with pytest.raises(EnvironmentFailure, match=r"meristem\.db"):
        Store(store.root).database.check_schema()


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from meristem.errors import EnvironmentFailure
from meristem.store.packs import Blob
from meristem.store.store import Store
store = Store(Path(sys.argv[1]))
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for change in (lambda: store.packs.write([Blob.file(b"x")]), lambda: store.transaction("kim").__enter__()):
    try:
        change()
    except EnvironmentFailure as error:
        print(error)
"""


def test_a_read_only_folder_is_an_environment_failure():
    """As a user without the right to write: root may write anywhere."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        store = Store(Path(name))
        store.database.create()
        store.packs.root.mkdir()
        store.database.close()
        before = sorted(Path(name).rglob("*"))
        store.packs.root.chmod(0o555)
        Path(name).chmod(0o555)
        command = [sys.executable, "-c", UNPRIVILEGED, name]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert sorted(Path(name).rglob("*")) == before
        Path(name).chmod(0o755)
        store.packs.root.chmod(0o755)
    assert len(ran.stdout.splitlines()) == 2, ran.stdout + ran.stderr
    assert "no permission" in ran.stdout


FULL = """
import resource, sys
from pathlib import Path
from meristem.errors import EnvironmentFailure
from meristem.store.store import Store
store = Store(Path(sys.argv[1]))
store.database.check_schema()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    with store.transaction("kim") as tx:
        for number in range(100):
            tx.append("test.happened", "x", filler="x" * 4000)
except EnvironmentFailure as error:
    print(error)
"""


def test_a_full_disk_takes_the_transaction_back(store):
    before = contents(store)
    store.database.close()
    ran = subprocess.run(
        [sys.executable, "-c", FULL, store.root], capture_output=True, text=True, check=False
    )
    assert "check space" in ran.stdout, ran.stderr
    assert contents(store) == before
    with store.transaction("kim") as tx:
        tx.append("test.happened", "x")


KILLED = """
import os, signal, sys
from pathlib import Path
from meristem.store.store import Store
store = Store(Path(sys.argv[1]))
with store.transaction("kim") as tx:
    for number in range(int(sys.argv[2])):
        tx.append("test.happened", "x", filler="x" * 4000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("size", [1, 2000])
def test_a_kill_in_the_middle_of_a_transaction_leaves_the_old_state(store, size):
    """Also when SQLite has spilled pages of the unfinished transaction into its log already."""
    with store.transaction("kim") as tx:
        tx.append("test.began", "x")
    before = contents(store)
    ran = subprocess.run([sys.executable, "-c", KILLED, store.root, str(size)], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert contents(store) == before
    with closing(sqlite3.connect(store.database.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with store.transaction("kim") as tx:
        assert tx.append("test.happened", "x").sequence == 2


AUDITOR = """
import os, sys
from pathlib import Path
from sqlalchemy import func, select
from meristem.errors import EnvironmentFailure
from meristem.store.schema import events
from meristem.store.store import Store
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
store = Store(Path(sys.argv[1]))
try:
    store.database.check_schema()
    with store.database.read() as connection:
        print(connection.scalar(select(func.count()).select_from(events)))
    with store.transaction("eve") as tx:
        tx.append("test.happened", "x")
except EnvironmentFailure as error:
    print(error)
"""


@pytest.fixture
def mounted(store):
    """A store with one event, closed, that only its owner may write, where other users can see it."""
    with store.transaction("kim") as tx:
        tx.append("test.happened", "x")
    store.database.close()
    place = Path(tempfile.mkdtemp())
    shutil.copytree(store.root, place / "store")
    yield place / "store"
    for folder in (place, place / "store"):
        folder.chmod(0o755)
    shutil.rmtree(place)


def _audit(folder):
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    folder.parent.chmod(0o755)
    before = sorted(folder.iterdir())
    command = [sys.executable, "-c", AUDITOR, folder]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sorted(folder.iterdir()) == before
    return ran.stdout.splitlines()


def test_a_read_only_copy_can_be_read_and_a_write_is_an_environment_failure(mounted):
    counted, refused = _audit(mounted)
    assert counted == "1" and "no permission to write" in refused


@pytest.mark.parametrize("index", [True, False], ids=["with its index", "without"])
def test_a_read_only_copy_with_a_log_is_read_with_it_or_not_at_all(mounted, index):
    """An event that stands only in the log beside the database is never passed over in silence."""
    open_store = Store(mounted)
    with open_store.transaction("kim") as tx:
        tx.append("test.happened", "y")
    logs = {
        name: (mounted / name).read_bytes() for name in ("meristem.db", "meristem.db-wal", "meristem.db-shm")
    }
    open_store.database.close()
    for name, body in logs.items():
        if index or not name.endswith("-shm"):
            (mounted / name).write_bytes(body)
    told = _audit(mounted)
    assert told[0] == "2" if index else "unable to open" in told[0], told
