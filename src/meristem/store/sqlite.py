"""SQLite: the default back end, one file.

WAL mode with ``synchronous=FULL``: a commit is on the disk when it returns. A write transaction takes the write lock at
once (``BEGIN IMMEDIATE``), so what it reads cannot move before it commits. A workspace that may not be written (an
auditor's read-only mount) is opened read-only: everything can be read and verified, and a write is refused.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError

from meristem.errors import EnvironmentFailure, StateMoved
from meristem.store.database import Database, begun

WRITABLE = "mode=rwc"


class SQLite(Database):
    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)
        self.engine = create_engine(f"sqlite:///{path}", creator=lambda: _connect(path, self.busy_seconds))
        event.listen(self.engine, "begin", _begin)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        if _mode(self.path) != WRITABLE:  # SQLite would begin, and refuse only the first change
            raise EnvironmentFailure(
                f"{self.path}: no permission to write; check the owner and mode of the workspace"
            )
        with _translated(self.path), begun(self.engine, write=True) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with _translated(self.path), begun(self.engine, write=False) as connection:
            yield connection

    def now(self, connection: Connection) -> float:
        return time.time()

    def exists(self) -> bool:
        return self.path.exists() and super().exists()

    def problems(self) -> list[str]:
        return self.damage()

    def damage(self) -> list[str]:
        with self.read() as connection:
            found = list(connection.exec_driver_sql("PRAGMA integrity_check").scalars())
        return [] if found == ["ok"] else [f"{self.path}: {line}" for line in found]

    def _ready(self) -> None:
        """SQLite makes the file itself."""

    _making = write


def _connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    mode = _mode(path)
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}",
        uri=True,
        timeout=busy_seconds,
        isolation_level=None,  # transactions are begun by _begin, not by the driver
        check_same_thread=False,  # the engine's pool hands a connection to one thread at a time
    )
    if mode == WRITABLE:
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _mode(path: Path) -> str:
    """How the file may be opened.

    Even to read, SQLite wants a ``-shm`` file beside a database in WAL mode. In a folder that lets it make none the
    database is taken as immutable, unless a log with content says that it is not whole by itself.
    """
    folder = os.access(path.parent, os.W_OK)
    if folder and (not path.exists() or os.access(path, os.W_OK)):
        return WRITABLE
    log = path.with_name(f"{path.name}-wal")
    if folder or (log.exists() and log.stat().st_size > 0):
        return "mode=ro"
    return "mode=ro&immutable=1"


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn the driver's errors into ours: one line, the right exit code."""
    try:
        yield
    except OperationalError as error:
        cause = str(error.orig)
        if "locked" in cause or "busy" in cause:
            raise StateMoved(f"{path}: another process is writing; try again") from error
        raise EnvironmentFailure(
            f"{path}: {cause}; check space and permissions, then repeat the command"
        ) from error
    except DBAPIError as error:
        if "malformed" in str(error.orig) or "not a database" in str(error.orig):
            raise EnvironmentFailure(f"{path}: {error.orig}; restore the file from a backup") from error
        raise
