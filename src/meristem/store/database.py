"""The database connection: one writer at a time, durable on commit.

SQLite in WAL mode with ``synchronous=FULL``; a write transaction takes the write lock at once
(``BEGIN IMMEDIATE``), so what it reads cannot move before it commits. A workspace that may not be written (an
auditor's read-only mount) is opened read-only: everything can be read and verified, and a write is refused.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, event, insert, inspect, select
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from meristem.errors import BadInput, EnvironmentFailure, StateMoved
from meristem.store.schema import SCHEMA_VERSION, metadata, settings

BUSY_SECONDS = 30
WRITABLE = "mode=rwc"


class Database:
    def __init__(self, path: Path):
        self.path = path
        self.engine = create_engine(f"sqlite:///{path}", creator=lambda: _connect(path))
        event.listen(self.engine, "begin", _begin)

    def create(self) -> None:
        """Make the tables of a new workspace. Raises ``StateMoved`` when there are some already."""
        try:
            with self.write() as connection:
                metadata.create_all(connection)
                connection.execute(insert(settings).values(key="schema_version", value=str(SCHEMA_VERSION)))
        except IntegrityError as error:
            raise StateMoved(f"{self.path}: another process made this workspace; open it") from error

    def exists(self) -> bool:
        """Whether ``create`` has run to its end."""
        if not self.path.exists():
            return False
        with self.read() as connection:
            return inspect(connection).has_table(settings.name)

    def check_schema(self) -> None:
        """Raises ``BadInput`` unless this Meristem reads the database's schema."""
        if not self.exists():
            raise EnvironmentFailure(
                f"{self.path}: not a workspace's database; restore the file from a backup"
            )
        with self.read() as connection:
            found = connection.scalar(select(settings.c.value).where(settings.c.key == "schema_version"))
        if found != str(SCHEMA_VERSION):
            raise BadInput(
                f"{self.path}: workspace schema {found}, this Meristem reads {SCHEMA_VERSION}; use a matching release"
            )

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction: committed on success, rolled back on any exception.

        Raises ``StateMoved`` when another writer held the lock for too long, ``EnvironmentFailure`` when the
        disk refuses.
        """
        if _mode(self.path) != WRITABLE:  # SQLite would begin, and refuse only the first change
            raise EnvironmentFailure(
                f"{self.path}: no permission to write; check the owner and mode of the workspace"
            )
        with _translated(self.path), self.engine.connect() as connection:
            connection = connection.execution_options(write=True)
            with connection.begin():
                yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: one consistent snapshot."""
        with _translated(self.path), self.engine.connect() as connection, connection.begin():
            yield connection

    def close(self) -> None:
        self.engine.dispose()


def _connect(path: Path) -> sqlite3.Connection:
    mode = _mode(path)
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}",
        uri=True,
        timeout=BUSY_SECONDS,
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
