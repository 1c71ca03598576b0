"""What the events alone imply: the index tables once more, folded from the chain into a file that is thrown away.

Memory stays flat however long the chain is: rows go to the file by the thousand, and both sides are compared as two
sorted streams. One small function per kind of event says what it means (``FOLDS``).
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Select, Table, select

from meristem.ecosystem.ledger import KINDS
from meristem.errors import EnvironmentFailure
from meristem.store.database import stream
from meristem.store.evidence import Event
from meristem.store.schema import (
    alias_actors,
    alias_moves,
    aliases,
    assets,
    evaluations,
    models,
    records,
    retired,
    versions,
)

PROJECTED = {
    "model": models,
    "version": versions,
    "asset": assets,
    "retired": retired,
    "alias": aliases,
    "alias move": alias_moves,
    "alias actor": alias_actors,
    "record": records,
    "evaluation": evaluations,
}
Values = tuple[Any, ...]
Report = Callable[[str, int | None], None]
_AT_ONCE = 2000
_REMEMBERED = 50_000  # digests that need not be asked for twice in a row
_CACHE_KIB = 4096
MOVED, PROTECTED = "alias.moved", "alias.protected"
_NO_VALUE = (
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    sqlite3.IntegrityError,
    OverflowError,
    UnicodeEncodeError,
)


# What each kind of event means: rows (in the order of the table's columns) that it makes true.

Fold = Callable[[Event, dict[str, Any]], Iterable[tuple[str, Values]]]


def _model_added(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    yield "models", (data["name"], data["tier"], data["base"], event.subject)


def _version_created(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    yield "versions", (event.subject, data["model"], data["number"], data["content"])


def _asset_added(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    yield "assets", (event.subject, data["kind"], data["name"], data["number"])


def _retired(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    yield "retired", (event.subject, event.sequence)


def _deleted(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    yield "deleted", (event.subject,)
    yield from _retired(event, data)


def _restored(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    yield "restored", (event.subject,)


def _alias_moved(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    model, alias, revision = data["model"], data["alias"], data["revision"]
    yield "aliases", (model, alias, event.subject, revision)
    yield "alias_moves", (model, alias, revision, event.subject, data["previous"], event.sequence)


def _alias_protected(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    model, alias = data["model"], data["alias"]
    yield "unprotected", (model, alias)
    for actor in data["actors"]:
        yield "alias_actors", (model, alias, actor)


def _evaluation_recorded(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    yield "evaluations", (data["content"], data["suite"], data["engine"], event.subject, data["seconds"])


def _record_opened(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    kind, _, _ = event.kind.partition(".")
    yield "records", (kind, data["number"], data["model"], event.subject, data["status"], None)


def _record_changed(event: Event, data: dict[str, Any]) -> Iterable[tuple[str, Values]]:
    kind, _, status = event.kind.partition(".")
    if "number" in data:
        yield "statuses", (status, data.get("result") or None, kind, data["number"])


FOLDS: dict[str, Fold] = {
    "model.added": _model_added,
    "version.created": _version_created,
    "version.retired": _retired,
    "version.restored": _restored,
    "asset.added": _asset_added,
    "asset.retired": _retired,
    "asset.restored": _restored,
    "asset.deleted": _deleted,
    MOVED: _alias_moved,
    PROTECTED: _alias_protected,
    "evaluation.recorded": _evaluation_recorded,
    **{f"{kind}.opened": _record_opened for kind in KINDS},
}


def _fold_of(kind: str) -> Fold | None:
    """None for an event that changes no table (``store.collected``, ``key.added``, one that is not known here)."""
    fold = FOLDS.get(kind)
    if fold is None and kind.partition(".")[0] in KINDS:
        return _record_changed
    return fold


def _columns(table: Table) -> str:
    return ", ".join(f'"{column.name}"' for column in table.columns)


def _key(table: Table) -> str:
    return ", ".join(f'"{column.name}"' for column in table.primary_key)


def _made(table: Table) -> str:
    """The table with its columns and its key (the first of them) and nothing else: it holds whatever events say."""
    return (
        f"CREATE TABLE {table.name} ({_columns(table)}, told_by, PRIMARY KEY ({_key(table)})) WITHOUT ROWID"
    )


def _insert(table: Table, verb: str = "INSERT OR IGNORE") -> str:
    return f"{verb} INTO {table.name} VALUES ({', '.join('?' * (len(table.columns) + 1))})"


# Rows of every statement end with the event's number. One that meets its row already there changes nothing and is
# looked into; tables whose rows are replaced as the history goes on are spelled out.
_STATEMENTS = {table.name: _insert(table) for table in PROJECTED.values()} | {
    "aliases": _insert(aliases, "INSERT OR REPLACE"),
    "retired": _insert(retired, "INSERT OR REPLACE"),
    "statuses": "UPDATE records SET status = ?, result = coalesce(?, result) WHERE kind = ? AND number = ? AND told_by < ?",
    "deleted": "INSERT OR IGNORE INTO deleted VALUES (?, ?)",
    "restored": "DELETE FROM retired WHERE digest = ? AND digest NOT IN (SELECT digest FROM deleted) AND ?",
    "unprotected": "DELETE FROM alias_actors WHERE model = ? AND alias = ? AND ?",
}
# These wait in one queue with the rows of the table that they change. (Of a record only its opening must be written
# before its statuses, which ask for it.)
_IN_ORDER = {"restored": "retired", "deleted": "retired", "unprotected": "alias_actors"}
_FREELY = ("deleted", "unprotected")  # may find nothing to change
_UNCONNECTED = """
    SELECT * FROM (
        SELECT told_by, model, alias, revision, previous, lag(revision, 1, 0) OVER line AS last,
            lag(version) OVER line AS version, lag(told_by, 1, 0) OVER line AS told_before
        FROM alias_moves WINDOW line AS (PARTITION BY model, alias ORDER BY revision)
    ) WHERE revision IS NOT last + 1 OR previous IS NOT version OR told_by < told_before"""


class Projection:
    """The tables of ``PROJECTED`` in a new file in ``folder``, and the digests that something names (``want``)."""

    def __init__(self, folder: Path, report: Report):
        self.report = report
        self._db = sqlite3.connect(folder / "projection.db", isolation_level=None)
        for setting in (
            "journal_mode=OFF",
            "synchronous=OFF",
            "locking_mode=EXCLUSIVE",
            f"cache_size=-{_CACHE_KIB}",
        ):
            self._db.execute(f"PRAGMA {setting}")
        self._db.execute("BEGIN")
        for table in PROJECTED.values():
            self._db.execute(_made(table))
        self._db.execute("CREATE TABLE deleted (digest PRIMARY KEY, told_by) WITHOUT ROWID")
        for name in ("documents", "blobs"):
            self._db.execute(f"CREATE TABLE wanted_{name} (digest PRIMARY KEY, source) WITHOUT ROWID")
        self._db.execute(
            "CREATE TABLE places (pack, at, digest, location, PRIMARY KEY (pack, at, digest)) WITHOUT ROWID"
        )
        self._queues: dict[str, list[tuple[str, Values]]] = defaultdict(list)
        self._wanted: dict[str, list[Values]] = {"documents": [], "blobs": []}
        self._recent: dict[str, set[str]] = {"documents": set(), "blobs": set()}
        self._protectors: dict[tuple[str, str], list[str]] = {}  # of the few aliases that are protected now

    def close(self) -> None:
        self._db.close()

    def fold(self, event: Event) -> None:
        """Take in what ``event`` says. Raises ``KeyError``, ``TypeError``, ... when it says nothing sensible."""
        if not isinstance(event.subject, str):
            raise TypeError(f"{event.subject!r} names nothing")
        self.want("documents", event.subject, event.sequence)
        fold = _fold_of(event.kind)
        if fold is None:
            return
        if event.kind in (MOVED, PROTECTED):
            self._check_actor(event)
        for statement, values in fold(event, event.data):
            queue = self._queues[_IN_ORDER.get(statement, statement)]
            queue.append((statement, (*values, event.sequence)))
            if len(queue) >= _AT_ONCE:
                if statement == "statuses":
                    self._flush(self._queues["records"])
                self._flush(queue)

    def _check_actor(self, event: Event) -> None:
        """Report ``event`` if its alias was protected from its actor."""
        alias = event.data["model"], event.data["alias"]
        allowed = self._protectors.get(alias)
        if allowed and event.actor not in allowed:
            problem = f"{'@'.join(alias)} was protected from {event.actor}, only {', '.join(allowed)} might"
            self.report(f"event {event.sequence}: {problem} do this", event.sequence)
        if event.kind == PROTECTED:
            self._protectors[alias] = event.data["actors"]
            if not event.data["actors"]:
                del self._protectors[alias]

    def check_moves(self) -> None:
        """Report every move of an alias that does not go on where the one before it led."""
        self.flush()
        for event, model, alias, revision, previous, last, version, _ in self._rows(_UNCONNECTED):
            found = f"revision {last} at {version}" if last else "no move"
            told = f"{model}@{alias} moves from {previous} to revision {revision}, and before it is {found}"
            self.report(f"event {event}: {told}", event)

    def want(self, what: str, digest: str, source: int | str) -> None:
        """``source`` (an event's number or a document's digest) names ``digest``, so it should be there."""
        recent = self._recent[what]
        if digest in recent:
            return
        if len(recent) >= _REMEMBERED:
            recent.clear()
        recent.add(digest)
        queue = self._wanted[what]
        queue.append((digest, source))
        if len(queue) >= _AT_ONCE:
            self._flush_wanted(what)

    def flush(self) -> None:
        """Write what is still held back: to be called before anything is asked."""
        self._flush(self._queues["records"])
        for queue in self._queues.values():
            self._flush(queue)
        for what in self._wanted:
            self._flush_wanted(what)

    def missing(self, what: str, there: Iterable[str]) -> Iterator[tuple[str, int | str]]:
        """What is wanted and not among ``there`` (sorted): ``(digest, who names it)``."""
        self.flush()
        wanted = self._rows(f"SELECT digest, source FROM wanted_{what} ORDER BY digest")
        for _, expected, actual in _merged(wanted, ((digest,) for digest in there), 1):
            if expected is not None and actual is None:
                yield expected[0], expected[1]

    def differences(self, connection: Connection) -> Iterator[tuple[str, str]]:
        """``(what, its key)`` wherever a table of the workspace is not what the events say."""
        self.flush()
        for what, table in PROJECTED.items():
            expected = self._rows(f"SELECT {_columns(table)} FROM {table.name} ORDER BY {_key(table)}")
            actual = (tuple(row) for row in stream(connection, _ordered(table)))
            for key, one, other in _merged(expected, actual, len(table.primary_key)):
                if one != other:
                    yield what, " ".join(str(value) for _, value in key)

    # Blobs

    def retired(self) -> Callable[[str], bool]:
        """Whether a version or an asset was given up, as a function of its digest."""
        self.flush()
        if self._one("SELECT 1 FROM retired LIMIT 1") is None:
            return lambda digest: False
        return lambda digest: self._one("SELECT 1 FROM retired WHERE digest = ?", digest) is not None

    def only_retired(self) -> Callable[[str], bool]:
        """Whether a content belongs to versions that were all given up, as a function of its digest."""
        self.flush()
        if self._one("SELECT 1 FROM retired LIMIT 1") is None:
            return lambda content: False
        self._db.execute("CREATE INDEX IF NOT EXISTS contents ON versions (content)")
        living = "SELECT sum(digest NOT IN (SELECT digest FROM retired)) FROM versions WHERE content = ?"  # NULL: none
        return lambda content: self._one(living, content) == 0

    def place(self, rows: Iterable[tuple[str, int, str, bytes]]) -> None:
        """Note where blobs lie: ``(pack, offset, digest, location)``."""
        self._many("INSERT OR IGNORE INTO places VALUES (?, ?, ?, ?)", list(rows))

    def places(self) -> Iterator[tuple[str, bytes]]:
        """``(pack, location)`` of every blob, pack by pack."""
        yield from self._rows("SELECT pack, location FROM places ORDER BY pack, at, digest")

    def count_places(self) -> int:
        return int(self._one("SELECT count(*) FROM places") or 0)

    # The file

    def _flush_wanted(self, what: str) -> None:
        queue = self._wanted[what]
        try:
            self._many(f"INSERT OR IGNORE INTO wanted_{what} VALUES (?, ?)", queue)
        except _NO_VALUE:  # a text that is no text, as JSON can spell it
            for digest, source in queue:
                try:
                    self._many(f"INSERT OR IGNORE INTO wanted_{what} VALUES (?, ?)", [(digest, source)])
                except _NO_VALUE:
                    self.report(f"{named_by(source)} names {digest!r}, which is no digest", _number(source))
        queue.clear()

    def _flush(self, queue: list[tuple[str, Values]]) -> None:
        start = 0
        while start < len(queue):
            statement, end = queue[start][0], start
            while end < len(queue) and queue[end][0] == statement:
                end += 1
            self._write(statement, [values for _, values in queue[start:end]])
            start = end
        queue.clear()

    def _write(self, statement: str, rows: list[Values]) -> None:
        before = self._db.total_changes
        try:
            self._many(_STATEMENTS[statement], rows)
        except _NO_VALUE:
            rows = [row for row in rows if self._write_alone(statement, row)]
            before = -1
        if statement not in _FREELY and self._db.total_changes - before != len(rows):
            for row in rows:
                self._look_into(statement, row)

    def _write_alone(self, statement: str, row: Values) -> bool:
        try:
            self._many(_STATEMENTS[statement], [row])
        except _NO_VALUE:
            self.report(f"event {row[-1]}: its data do not say what happened", row[-1])
            return False
        return True

    def _look_into(self, statement: str, row: Values) -> None:
        """Report ``row`` unless it is what the table holds."""
        event = row[-1]
        if statement == "statuses":
            _, _, kind, number, _ = row
            query = "SELECT 1 FROM records WHERE kind = ? AND number = ? AND told_by < ?"
            if self._one(query, kind, number, event) is None:
                self.report(f"event {event}: there is no {kind}-{number} whose status could change", event)
            return
        if statement == "restored":
            if deletion := self._one("SELECT told_by FROM deleted WHERE digest = ?", row[0]):
                self.report(f"event {event}: it restores what event {deletion} deleted for good", event)
            return
        key = next(table for table in PROJECTED.values() if table.name == statement).primary_key
        where = " AND ".join(f'"{column.name}" = ?' for column in key)
        made = self._one(f"SELECT told_by FROM {statement} WHERE {where}", *row[: len(key)])
        if made is None:
            self.report(f"event {event}: its data do not say what happened", event)
        elif made != event and statement not in ("aliases", "retired"):
            self.report(f"event {event}: it says again what event {made} said", event)

    def _many(self, statement: str, rows: list[Values]) -> None:
        try:
            self._db.executemany(statement, rows)
        except sqlite3.OperationalError as error:
            raise _full(error) from error

    def _one(self, query: str, *values: Any) -> Any:
        found = self._db.execute(query, values).fetchone()
        return found[0] if found else None

    def _rows(self, query: str) -> Iterator[Values]:
        cursor = self._db.execute(query)
        while rows := cursor.fetchmany(_AT_ONCE):
            yield from rows


def named_by(source: int | str) -> str:
    return f"event {source}" if isinstance(source, int) else f"document {source}"


def _number(source: int | str) -> int | None:
    return source if isinstance(source, int) else None


def _full(error: sqlite3.Error) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"the audit's temporary file: {error}; free space in the temporary folder (TMPDIR)"
    )


def _ordered(table: Table) -> Select[Any]:
    return select(table).order_by(*table.primary_key)


def _sortable(value: Any) -> tuple[int, Any]:
    """Values as SQLite sorts them, which lets any value stand in any column."""
    if isinstance(value, int | float):
        return (1, value)
    if isinstance(value, str):
        return (2, value)
    return (0, 0) if value is None else (3, value)


def _merged(
    expected: Iterable[Values], actual: Iterable[Values], width: int
) -> Iterator[tuple[tuple[tuple[int, Any], ...], Values | None, Values | None]]:
    """Pairs from two streams sorted by their first ``width`` values; None where one side lacks the key."""
    ones, others = iter(expected), iter(actual)
    one, other = next(ones, None), next(others, None)
    while one is not None or other is not None:
        if one is not None and one == other:  # nearly always
            yield (), one, other
            one, other = next(ones, None), next(others, None)
            continue
        left = tuple(map(_sortable, one[:width])) if one is not None else None
        right = tuple(map(_sortable, other[:width])) if other is not None else None
        if right is None or (left is not None and left < right):
            assert left is not None
            yield left, one, None
            one = next(ones, None)
        elif left is None or right < left:
            yield right, None, other
            other = next(others, None)
        else:
            yield left, one, other
            one, other = next(ones, None), next(others, None)
