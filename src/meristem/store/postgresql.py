"""PostgreSQL: the back end for teams, one workspace per database.

Writers queue for one table lock (the hash chain of the evidence has one head, so they could not work side by side);
readers take a ``REPEATABLE READ`` snapshot and wait for nobody. Passwords come from libpq's own places
(``PGPASSWORD``, ``~/.pgpass``), so that ``meristem.yaml`` can be shown to anybody.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError

from meristem.errors import BadInput, EnvironmentFailure, StateMoved
from meristem.store.database import Database, begun
from meristem.store.schema import events

# A peer that is gone (power, network) is noticed after about a minute, not after the system's two hours.
_PATIENCE = {
    "connect_timeout": 30, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}  # fmt: skip
_IDLE = "5min"  # a writer that is suspended for longer loses its transaction, not everybody's time
_CREATE_LOCK = 0x6D657269  # "meri": any number, the same for every creator
# Classes of SQLSTATE that mean "somebody else was first": a deadlock or failed serialization, a lock not granted.
_LOST = ("25P03", "57P01", "57P02")  # ended for idling, or with the server
_REFUSED = ("08", "25", "28", "3D", "53", "57", "58")  # unreachable, read-only, password, no such, full, disk
_MOVED = ("40", "55P03")


class PostgreSQL(Database):
    """Raises ``BadInput`` for a URL that is not PostgreSQL's, ``EnvironmentFailure`` without the driver."""

    def __init__(self, url: str):
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise BadInput("store: not a database URL; write postgresql://user@host/database") from error
        if parsed.get_backend_name() not in ("postgresql", "postgres"):
            raise BadInput(
                f"store: {parsed.drivername}: write postgresql://user@host/database, or leave it out for SQLite"
            )
        if importlib.util.find_spec("psycopg") is None:
            raise EnvironmentFailure("psycopg is not installed; pip install 'meristem[postgres]'")
        self.name = parsed.render_as_string(hide_password=True)
        self.engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,  # a server that was restarted meanwhile
            connect_args={"application_name": "meristem", **_PATIENCE},
        )
        event.listen(self.engine, "begin", self._begin)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        with self._translated(), begun(self.engine, write=True) as connection:
            connection.execute(text(f"LOCK TABLE {events.name} IN EXCLUSIVE MODE"))
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._translated(), begun(self.engine, write=False) as connection:
            yield connection

    def now(self, connection: Connection) -> float:
        return float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())")))

    def problems(self) -> list[str]:
        with self.read() as connection:
            synced = connection.scalar(text("SHOW fsync"))
        return [] if synced == "on" else [f"{self.name}: fsync is off; the server may lose what it confirmed"]

    def _ready(self) -> None:
        with self.read():
            pass

    @contextmanager
    def _making(self) -> Iterator[Connection]:
        with self._translated(), begun(self.engine, write=True) as connection:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_CREATE_LOCK})"))
            yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the driver's errors into ours: one line, the right exit code."""
        try:
            yield
        except DBAPIError as error:
            state = getattr(error.orig, "sqlstate", None) or ""
            cause = " ".join(str(error.orig).split())
            if state.startswith(_MOVED):
                raise StateMoved(f"{self.name}: another process is writing; try again") from error
            if error.connection_invalidated or state in _LOST:
                raise EnvironmentFailure(
                    f"{self.name}: the connection was lost ({cause}); whether the last change was made is not known: "
                    "look at `meristem log show` before you repeat it"
                ) from error
            if state[:2] == "28" or "password" in cause:
                raise EnvironmentFailure(
                    f"{self.name}: {cause}; set PGPASSWORD or write ~/.pgpass, and check the user"
                ) from error
            if not state or state[:2] in _REFUSED:
                raise EnvironmentFailure(
                    f"{self.name}: {cause}; check the server and its log, then repeat the command"
                ) from error
            if state == "42501":
                raise EnvironmentFailure(f"{self.name}: {cause}; ask for the permission") from error
            raise

    def _begin(self, connection: Connection) -> None:
        if connection.get_execution_options().get("write", False):
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(self.busy_seconds * 1000)}")
            connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
            connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{_IDLE}'")
        else:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
