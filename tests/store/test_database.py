"""SQLite keeps the contract, and fails as an operating system makes it fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from meristem.errors import BadInput, EnvironmentFailure
from meristem.store.store import Store
from meristem.testing.database import DatabaseContract, contents


class TestSQLite(DatabaseContract):
    @pytest.fixture
    def open_store(self, tmp_path):
        made = [Store(tmp_path)]
        made[0].database.create()

        def again():
            made.append(Store(tmp_path))
            return made[-1]

        yield again
        for store in made:
            store.database.close()

    def place(self, store):
        return str(store.root), None, None


def test_commits_are_synced(store):
    with store.database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


@pytest.mark.parametrize("text", ["\udcff", float("nan"), 2**60])
def test_what_json_cannot_carry_is_bad_input_and_changes_nothing(store, text):
    """A note typed in another encoding reaches Python as a lone surrogate."""
    document = {"schema": "meristem/test/v1", "text": text}
    with pytest.raises(BadInput, match="cannot be stored"), store.transaction("kim") as tx:
        tx.add_document(document)
    with pytest.raises(BadInput, match="cannot be stored"), store.transaction("kim") as tx:
        tx.append("test.happened", "x", text=text)
    assert contents(store) == [[], [], []]


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


AUDITOR = """
import os, sys
from pathlib import Path
from sqlalchemy import func, select
from meristem.errors import EnvironmentFailure
from meristem.store.schema import events
from meristem.store.store import Store
store = Store(Path(sys.argv[1]))
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
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
