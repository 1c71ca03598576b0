"""The database behind a workspace: what every back end promises.

``SQLite`` (a file, the default) and ``PostgreSQL`` (a server, for teams) keep this contract; the suite that checks it
ships as ``meristem.testing.database``.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, Executable, Row, insert, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from meristem.errors import BadInput, EnvironmentFailure, StateMoved
from meristem.store import evidence, migrations
from meristem.store.canonical import canonical, digest_bytes
from meristem.store.schema import REVISION, documents, metadata, schema_revision, settings

FIRST = "0001"  # the first release wrote no Alembic revision, but this setting
_FIRST_SETTING = ("schema_version", "1")
STORE = "store_id"  # a setting: which store this is, for the place of its packs to name
MIGRATION_SCHEMA = "meristem/migration/v1"
_AT_ONCE = 1000


class Database(ABC):
    """Tables behind transactions. One workspace is one database; many processes and machines may share it.

    - A **write** transaction is alone: what it reads cannot move before it commits. It is committed whole or not at
      all, and durable (on the disk of the server, through its caches) when the ``with`` block has been left.
    - A **read** transaction sees one snapshot from its first statement on, and keeps no writer waiting.
    - Failures are ``StateMoved`` (somebody else holds the lock: repeat) or ``EnvironmentFailure`` (disk, network,
      permission), in one line, and leave nothing half-written. When the connection breaks during a commit nobody can
      say whether it happened: the message says so.
    - Numbers are whole up to 2**63 - 1 in every ``Big`` column, bytes come back as they went in, text sorts by its
      code points.
    """

    name: str  # for people; holds no password
    engine: Engine
    busy_seconds = 30.0  # how long a writer waits for another one

    @abstractmethod
    def write(self) -> AbstractContextManager[Connection]:
        """A write transaction: committed at the end of the block, rolled back on any exception.

        Raises ``StateMoved`` when another writer held the lock for too long, ``EnvironmentFailure`` when the disk, the
        network or the permissions refuse.
        """

    @abstractmethod
    def read(self) -> AbstractContextManager[Connection]:
        """A read transaction. Raises ``EnvironmentFailure`` when the database cannot be reached or read."""

    @abstractmethod
    def now(self, connection: Connection) -> float:
        """Seconds since 1970 (UTC), by one clock for all that share the database: leases end by it."""

    @abstractmethod
    def problems(self) -> list[str]:
        """What the back end itself finds wrong with its files and its settings; one line each."""

    def damage(self) -> list[str]:
        """Those of ``problems`` that are damage to what is stored, for a back end that can tell."""
        return []

    @abstractmethod
    def _ready(self) -> None:
        """Raises ``EnvironmentFailure`` unless tables can be made."""

    def create(self) -> None:
        """Make the tables of a new workspace. Raises ``StateMoved`` when there are some already."""
        self._ready()
        try:
            with self._making() as connection:
                if inspect(connection).has_table(settings.name):
                    raise StateMoved(f"{self.name}: another process made this workspace; open it")
                metadata.create_all(connection)
                connection.execute(insert(schema_revision).values(version_num=REVISION))
                _identify(connection)
        except SQLAlchemyError as error:
            raise StateMoved(f"{self.name}: another process makes this workspace; open it") from error

    @abstractmethod
    def _making(self) -> AbstractContextManager[Connection]:
        """A write transaction before there are tables."""

    def exists(self) -> bool:
        """Whether ``create`` has run to its end."""
        with self.read() as connection:
            return inspect(connection).has_table(settings.name)

    def revision(self) -> str:
        """The schema revision found. Raises ``EnvironmentFailure`` where there are no tables of a workspace."""
        if not self.exists():
            raise EnvironmentFailure(
                f"{self.name}: there is no workspace in it; `meristem init` makes a new one, or restore it from a backup"
            )
        with self.read() as connection:
            return _revision(connection)

    def check_schema(self) -> None:
        """Raises ``BadInput`` unless this Meristem reads the database's schema, saying what leads there."""
        found = self.revision()
        if found == REVISION:
            return
        if found < REVISION and found.isdecimal():
            raise BadInput(
                f"{self.name}: workspace schema {found}, this Meristem reads {REVISION}; back the store up, then run "
                "`meristem store migrate`"
            )
        raise BadInput(
            f"{self.name}: workspace schema {found}, this Meristem reads {REVISION}; use a matching release"
        )

    def migrate(self, actor: str) -> tuple[str, str]:
        """Lead an older schema to this one in one transaction, and record it; returns ``(from, to)``.

        Raises ``BadInput`` for a schema that this Meristem does not know.
        """
        if self.revision() == REVISION:
            return REVISION, REVISION
        with self.write() as connection:
            found = _revision(connection)  # by now
            if found != REVISION:
                if found > REVISION or not found.isdecimal():
                    raise BadInput(
                        f"{self.name}: workspace schema {found}, this Meristem knows up to {REVISION}; use a newer one"
                    )
                migrations.upgrade(connection, found, REVISION)
                _identify(connection)
                body = canonical({"schema": MIGRATION_SCHEMA, "from": found, "to": REVISION})
                digest = digest_bytes(body)
                connection.execute(
                    insert(documents).values(digest=digest, schema=MIGRATION_SCHEMA, body=body)
                )
                reason = f"schema {found} led to {REVISION}"
                evidence.append(
                    connection, kind="store.migrated", subject=digest, actor=actor, reason=reason, data={}
                )
            return found, REVISION

    def close(self) -> None:
        self.engine.dispose()


def _identify(connection: Connection) -> None:
    connection.execute(insert(settings).values(key=STORE, value=secrets.token_hex(16)))


def _revision(connection: Connection) -> str:
    if inspect(connection).has_table(schema_revision.name):
        return str(connection.scalar(select(schema_revision.c.version_num)))
    key, first = _FIRST_SETTING
    found = connection.scalar(select(settings.c.value).where(settings.c.key == key))
    return FIRST if found == first else f"{found}?"


def stream(connection: Connection, query: Executable) -> Iterator[Row[Any]]:
    """The rows of ``query``, fetched by the thousand: memory stays flat however many there are."""
    yield from connection.execute(query, execution_options={"yield_per": _AT_ONCE})


@contextmanager
def begun(engine: Engine, *, write: bool) -> Iterator[Connection]:
    """A transaction on a connection whose ``write`` option tells the back end's begin hook what is wanted."""
    with engine.connect() as connection:
        connection = connection.execution_options(write=write)
        with connection.begin():
            yield connection
