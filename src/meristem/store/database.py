"""The database connection: one writer at a time, durable on commit.

SQLite in WAL mode with ``synchronous=FULL``; a write transaction takes the write lock at once
(``BEGIN IMMEDIATE``), so what it reads cannot move before it commits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, insert, inspect, select
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from meristem.errors import BadInput, EnvironmentFailure, StateMoved
from meristem.store.schema import SCHEMA_VERSION, metadata, settings

BUSY_SECONDS = 30


class Database:
    def __init__(self, path: Path):
        self.path = path
        self.engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS})
        event.listen(self.engine, "connect", _configure)
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


def _configure(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin, not by the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


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
