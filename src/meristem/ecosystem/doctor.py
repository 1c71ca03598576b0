"""``doctor``: is this workspace healthy, and how is each fault mended? Nothing is ever written.

Every check stands alone: one that fails is a problem of its own and keeps no other from running, so that a broken
workspace, one of an older schema, or one that can only be read is told about like any other.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, inspect, select

from meristem.config import CONFIG_NAME, WorkspaceConfig, load_config
from meristem.ecosystem import aliases, surroundings, versions
from meristem.ecosystem.projection import MOVED
from meristem.ecosystem.reach import FINISHED
from meristem.ecosystem.surroundings import Status, Told, ok, problem, warning
from meristem.errors import BadInput, EnvironmentFailure, MeristemError, Tampered
from meristem.store import leases
from meristem.store.canonical import digest_bytes, parse
from meristem.store.evidence import Event
from meristem.store.index import locate
from meristem.store.local_packs import LocalPacks
from meristem.store.schema import REVISION, alias_moves, blobs, checkpoints, events, records
from meristem.store.schema import aliases as alias_table
from meristem.store.schema import leases as lease_table
from meristem.store.schema import versions as version_table
from meristem.store.store import DATABASE_FILE, Store
from meristem.store.threads import spread

Progress = Callable[[str, int, int, str], None]  # what, done, total, note

_FLOOR = 1 << 30  # bytes that should stay free beside what the next commit takes
_LEAST = 16 << 20  # bytes without which a database cannot work
_SKEW = 5.0  # seconds that two clocks may differ
_SIGN_AFTER = 1000  # events without a signature over them, or
_SIGN_DAYS = 30
_SHOWN = 3  # names in one line


@dataclass(frozen=True)
class Finding:
    check: str
    status: Status
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Health:
    """What was found; ``reached`` is whether database and packs answered at all."""

    findings: list[Finding]
    reached: bool

    @property
    def problems(self) -> int:
        return sum(finding.status == "problem" for finding in self.findings)

    @property
    def warnings(self) -> int:
        return sum(finding.status == "warning" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        if not self.reached:
            return EnvironmentFailure.exit_code
        return 1 if self.problems else 0


class _Examination:
    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.reached = True

    def run(self, check: str, told: Callable[[], Iterator[Told]], reaching: bool = False) -> bool:
        """Add what ``told`` finds; False when it failed. A ``reaching`` one may find the store out of reach."""
        try:
            for found in told():
                self.findings.append(Finding(check, *found))
        except MeristemError as error:
            text, _, remedy = str(error).rpartition("; ")  # our messages end in what to do
            self.findings.append(Finding(check, "problem", text or remedy, remedy))
            self.reached &= not (reaching and isinstance(error, EnvironmentFailure))
            return False
        except Exception as error:
            text = " ".join(f"could not be checked: {type(error).__name__}: {error}".split())
            self.findings.append(
                Finding(check, "problem", text, "`meristem log verify` names what is damaged")
            )
            return False
        return True


def examine(
    root: Path,
    folder: Path,
    store_of: Callable[[WorkspaceConfig | None], Store],
    check: Callable[[WorkspaceConfig], None],
    progress: Progress | None = None,
) -> Health:
    """Check the workspace in ``root`` with this machine's ``folder`` in it.

    ``store_of`` makes the store from the configuration, or where it lies by default (None). ``check`` raises
    ``BadInput`` for a configuration that can be read but not used. Raises ``BadInput`` where there is no workspace at
    all.
    """
    if not (root / CONFIG_NAME).exists() and not folder.exists():
        raise BadInput(f"{root}: no workspace here; make one with `meristem init {root}`")
    done = _Examination()
    config: list[WorkspaceConfig] = []
    done.run("configuration", lambda: _configuration(root, config, check))
    if not config and not (folder / DATABASE_FILE).exists():
        # A slip in the file is a problem like any other; without the file nobody knows where the store is.
        done.reached = (root / CONFIG_NAME).exists()
        done.run("permissions", lambda: surroundings.permissions(root, [folder]))
        return Health(done.findings, done.reached)
    stores: list[Store] = []
    reached = done.run("store", lambda: _made(store_of, config[0] if config else None, stores), reaching=True)
    inner = [root / CONFIG_NAME, folder, folder / "runs", folder / "cache"]
    if not (config and config[0].store):
        inner.append(folder / DATABASE_FILE)
        done.run("file system", lambda: surroundings.file_system(folder))
    if stores and isinstance(stores[0].packs, LocalPacks):
        inner.append(stores[0].packs.root)
    done.run("permissions", lambda: surroundings.permissions(root, inner))
    done.run("signing key", lambda: surroundings.signing_key(root))
    if reached:
        store = stores[0]
        try:
            _examine_store(done, store, progress)
        finally:
            store.database.close()
    return Health(done.findings, done.reached)


def _examine_store(done: _Examination, store: Store, progress: Progress | None) -> None:
    readable = done.run("schema", lambda: _schema(store), reaching=True)
    done.run("free space", lambda: _space(store, readable))  # a full disk may be why it is not
    if not readable:
        return
    done.run("database", lambda: _database(store))
    there: list[set[str]] = []
    if done.run("packs", lambda: _packs(store, there, progress), reaching=True) and there:
        done.run("leftovers", lambda: _leftovers(store, there[0]))
        done.run("bucket", lambda: _bucket(store))
    done.run("evidence", lambda: _evidence(store))
    done.run("aliases", lambda: _aliases(store))
    done.run("clock", lambda: _clock(store))
    done.run("updates", lambda: _updates(store))
    done.run("leases", lambda: _leases(store))


def _configuration(
    root: Path, read: list[WorkspaceConfig], check: Callable[[WorkspaceConfig], None]
) -> Iterator[Told]:
    path = root / CONFIG_NAME
    if not path.exists():
        yield problem(
            f"{path} is gone", f"bring it back from a backup, or write a new one with `meristem init {root}`"
        )
        return
    try:
        read.append(load_config(path))
        check(read[0])
    except BadInput as error:
        yield problem(str(error), f"mend that line of {path}")
    else:
        yield ok(f"{path} is in order")


def _made(
    store_of: Callable[[WorkspaceConfig | None], Store], config: WorkspaceConfig | None, made: list[Store]
) -> Iterator[Told]:
    made.append(store_of(config))
    packs = made[0].packs
    yield ok(f"{made[0].database.name}, packs in {getattr(packs, 'url', None) or getattr(packs, 'root', '')}")


def _schema(store: Store) -> Iterator[Told]:
    found = store.database.revision()
    if found == REVISION:
        yield ok(f"revision {found}")
    elif found < REVISION and found.isdecimal():
        yield problem(
            f"revision {found}, this Meristem reads {REVISION}",
            "back the store up, then run `meristem store migrate`",
        )
    else:
        yield problem(
            f"revision {found}, this Meristem reads {REVISION}", "use a matching release of Meristem"
        )


def _database(store: Store) -> Iterator[Told]:
    found = store.database.problems()
    for line in found[:_SHOWN]:
        yield problem(line, "restore the database from a backup, then run `meristem log verify`")
    if not found:
        yield ok("the database finds no damage in itself")


def _packs(store: Store, there: list[set[str]], progress: Progress | None) -> Iterator[Told]:
    """Whether each pack of the index is there and long enough. Fills ``there`` with the packs that are."""
    # Listed before the index is read: a pack that is stored meanwhile is in neither, or in the index.
    there.append(set(store.packs.names()))
    end = func.max(blobs.c.offset + blobs.c.length)
    with store.database.read() as connection:
        query = select(blobs.c.pack, func.count(), end, func.sum(blobs.c.length)).group_by(blobs.c.pack)
        rows = connection.execute(query).all()
    broken = []
    for number, (row, size) in enumerate(
        zip(rows, spread(lambda row: _size(store, row.pack), rows), strict=True), start=1
    ):
        if size is None or size < int(row[2]):
            broken.append(row.pack)
        if progress:
            progress("packs", number, len(rows), "")
    if broken:  # unless gc has repacked one meanwhile
        with store.database.read() as connection:
            named = set(connection.scalars(select(blobs.c.pack).distinct()))
        broken = [pack for pack in broken if pack in named]
    if broken:
        yield problem(
            f"{len(broken)} of {len(rows)} packs are gone or cut short: {_some(sorted(broken))}",
            "bring them back from a backup; `meristem log verify` names what they held",
        )
    else:
        held = f"{sum(row[1] for row in rows)} blobs in {len(rows)} packs ({_in_units(sum(int(row[3]) for row in rows))})"
        yield ok(f"{held} are there; `meristem log verify` checks every byte")


def _size(store: Store, pack: str) -> int | None:
    try:
        return store.packs.size(pack)
    except Tampered:
        return None


def _leftovers(store: Store, there: set[str]) -> Iterator[Told]:
    """What writers that died left behind: packs that nobody names, temporaries, and half-made checkouts."""
    with store.database.read() as connection:
        named = set(connection.scalars(select(blobs.c.pack).distinct()))
        if _has(connection, lease_table.name):
            named |= leases.held(connection, store.database.now(connection))
    unnamed = sorted(there - named)
    unfinished = [name for name, age in store.packs.leftovers() if age > store.lease_seconds]
    if unnamed or unfinished:
        size = sum(_size(store, pack) or 0 for pack in unnamed)
        yield warning(
            f"{len(unnamed)} packs that nothing names ({_in_units(size)}), {len(unfinished)} unfinished ones",
            "`meristem store gc`",
        )
    for path in sorted((store.root / "cache").glob(".*")):
        if not _lives(path.name):
            yield warning(f"{path}: a checkout that was never finished", f"`rm -r {shlex.quote(str(path))}`")
    if not (unnamed or unfinished):
        yield ok("nothing is left of dead writers")


def _bucket(store: Store) -> Iterator[Told]:
    """Whether an S3 bucket keeps what is deleted from it. One that cannot say so is passed over."""
    call = getattr(getattr(store.packs, "fs", None), "call_s3", None)
    if call is None:
        return
    bucket = str(getattr(store.packs, "root", "")).partition("/")[0]
    status = None
    with suppress(Exception):  # not every server knows the request, and not every key may send it
        status = call("get_bucket_versioning", Bucket=bucket).get("Status")
    if status:  # a suspended one has kept what was deleted before
        yield warning(
            f"versioning of bucket {bucket} is {status.lower()}: packs removed by gc and `data delete` stay as old versions",
            "let a lifecycle rule of the bucket expire noncurrent versions, or keep packs where there are none",
        )


def _lives(name: str) -> bool:
    """Whether the process in the name ``.DIGEST-PID-RANDOM`` of a temporary is alive (on this machine)."""
    with suppress(IndexError, ValueError, ProcessLookupError, PermissionError):
        os.kill(int(name.split("-")[1]), 0)
        return True
    return False


def _evidence(store: Store) -> Iterator[Told]:
    with store.database.read() as connection:
        head = connection.execute(select(events).order_by(events.c.sequence.desc()).limit(1)).first()
        count = connection.scalar(select(func.count()).select_from(events))
        if head is None:
            yield ok("no event yet")
            return
        if count != head.sequence or digest_bytes(head.body) != head.hash:
            yield problem(
                f"{count} events, the newest is {head.sequence}: the chain is damaged",
                "`meristem log verify`",
            )
            return
        yield ok(f"{head.sequence} events, head {head.hash}")
        if _has(connection, checkpoints.name):
            yield from _signed(connection, head.sequence)


def _signed(connection: Connection, newest: int) -> Iterator[Told]:
    row = connection.execute(select(checkpoints).order_by(checkpoints.c.sequence.desc()).limit(1)).first()
    sign = "`meristem log checkpoint`"
    if row is None:
        yield warning(
            "no signed checkpoint: whoever can write the database can recompute the chain",
            f"`meristem key add --file FILE` once, then {sign} from time to time",
        )
        return
    body = parse(row.body)
    known = connection.scalar(select(events.c.hash).where(events.c.sequence == row.sequence))
    if known != body["head"]:
        yield problem(
            f"the signed checkpoint of event {row.sequence} names another head", "`meristem log verify`"
        )
        return
    days = (time.time() - _seconds(body["time"])) / 86400
    text = (
        f"signed up to event {row.sequence}, {newest - row.sequence} events and {max(0.0, days):.0f} days ago"
    )
    late = newest - row.sequence >= _SIGN_AFTER or (newest > row.sequence and days >= _SIGN_DAYS)
    yield warning(text, sign) if late else ok(text)


def _aliases(store: Store) -> Iterator[Told]:
    """Whether every alias is where the evidence moved it, and the index has a place for every blob below it."""
    with store.database.read() as connection:
        held = {(row.model, row.alias): row for row in connection.execute(select(alias_table))}
        moves = _last_moves(connection)
        names: dict[str, list[str]] = {}
        sound = True
        for model, alias in sorted(held.keys() | moves.keys()):
            row, move = held.get((model, alias)), moves.get((model, alias))
            if row is not None:
                names.setdefault(row.version, []).append(f"{model}@{alias}")
            if row is None or move is None or not _agree(row, move):
                sound = False
                yield problem(f"{model}@{alias} is not where the evidence moved it", "`meristem log verify`")
        for version, pointing in names.items():
            named = _named(connection, version)
            if lost := len(named) - len(locate(connection, named)):
                sound = False
                yield problem(
                    f"{', '.join(pointing)}: {lost} of {len(named)} blobs are not in the index",
                    "restore the packs from a backup, then `meristem store reindex`",
                )
    if sound:
        yield ok(f"{len(held)} aliases are where the evidence moved them, with every blob below them")


def _last_moves(connection: Connection) -> dict[tuple[str, str], Row[Any]]:
    """The newest move of every alias, with its event."""
    of_alias = (alias_moves.c.model, alias_moves.c.alias)
    last = (
        select(*of_alias, func.max(alias_moves.c.revision).label("revision")).group_by(*of_alias).subquery()
    )
    newest = (
        (alias_moves.c.model == last.c.model)
        & (alias_moves.c.alias == last.c.alias)
        & (alias_moves.c.revision == last.c.revision)
    )
    query = select(alias_moves, events.c.body, events.c.hash).join(last, newest)
    query = query.outerjoin(events, events.c.sequence == alias_moves.c.event)
    return {(row.model, row.alias): row for row in connection.execute(query)}


def _agree(row: Row[Any], move: Row[Any]) -> bool:
    """Whether an alias's row, its last move and the event of that move say the same."""
    if move.body is None or digest_bytes(move.body) != move.hash:
        return False
    event = Event.from_body(move.body)
    told = tuple(event.data.get(name) for name in ("model", "alias", "revision"))
    return (
        event.kind == MOVED
        and (row.model, row.alias, row.revision) == (move.model, move.alias, move.revision) == told
        and row.version == move.version == event.subject
    )


def _clock(store: Store) -> Iterator[Told]:
    remedy = "set the clocks by NTP"
    with store.database.read() as connection:
        before = time.time()
        apart = store.database.now(connection) - before
        newest = connection.scalar(select(events.c.body).order_by(events.c.sequence.desc()).limit(1))
    bad = False
    if abs(apart) > _SKEW:
        bad = True
        yield warning(f"the database's clock is {apart:+.0f} s from this machine's", remedy)
    if newest is not None:
        ahead = _seconds(Event.from_body(newest).time) - before
        if ahead > _SKEW:
            bad = True
            yield problem(f"the newest event is {ahead:.0f} s in the future of this machine's clock", remedy)
    if not bad:
        yield ok(f"{datetime.fromtimestamp(before, UTC):%Y-%m-%d %H:%M:%S} UTC, and no event is newer")


def _space(store: Store, readable: bool) -> Iterator[Told]:
    """Room for what the next commit and its checkout may take: both of the largest champion, if that is known."""
    root = store.root.absolute()  # missing on a machine that has not worked with the team's store yet
    free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    text, largest = f"{_in_units(free)} free", 0
    if readable:
        largest = _largest_champion(store)
        text += f"; the largest champion takes {_in_units(largest)}"
    remedy = "free some space (`meristem store gc --dry-run` says what gc would give back)"
    if free < max(_LEAST, 2 * largest):
        yield problem(text, remedy)
    elif free < 2 * largest + _FLOOR:
        yield warning(text, remedy)
    else:
        yield ok(text)


def _largest_champion(store: Store) -> int:
    """The bytes of the largest champion with all that it sits on."""
    with store.database.read() as connection:
        champions = connection.scalars(
            select(alias_table.c.version).where(alias_table.c.alias == aliases.CHAMPION)
        ).all()
        named = (locate(connection, _named(connection, digest)).values() for digest in champions)
        return max((sum(location.length for location in found) for found in named), default=0)


def _named(connection: Connection, version: str) -> set[str]:
    """The blobs of a version with all that it sits on."""
    named: set[str] = set()
    digest = connection.scalar(select(version_table.c.content).where(version_table.c.digest == version))
    while digest:
        content = versions.content_of(connection, digest)
        named |= {*content.tensors.values(), *content.files.values()}
        digest = content.base
    return named


def _updates(store: Store) -> Iterator[Told]:
    with store.database.read() as connection:
        query = select(records.c.number, records.c.status).where(records.c.kind == "update")
        status = {f"update-{row.number}": row.status for row in connection.execute(query)}
    runs = store.root / "runs"
    running = 0
    for name in (name for name, state in status.items() if state not in FINISHED):
        if _held(runs / f"{name}.lock"):
            running += 1
            continue
        state = "begun" if status[name] == "open" else status[name]
        yield warning(
            f"{name} is {state}, and no process of this machine runs it", f"`meristem update resume {name}`"
        )
    for folder in sorted(path for path in runs.glob("*") if path.is_dir()):
        if _held(folder) or _held(runs / f"{folder.name}.lock"):
            continue
        if status.get(folder.name) in FINISHED:
            yield warning(f"{folder}: what is left of a run that is finished", "`meristem store gc`")
        elif folder.name not in status:  # of another workspace, or of a reproduction that was killed
            text = f"{folder}: a run that this workspace knows nothing of"
            yield warning(text, f"`rm -r {shlex.quote(str(folder))}`")
    done = sum(state == "done" for state in status.values())
    yield ok(f"{done} done, {running} under way")


def _held(path: Path) -> bool:
    """Whether a living process of this machine holds the lock on ``path``."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _leases(store: Store) -> Iterator[Told]:
    with store.database.read() as connection:
        if not _has(connection, lease_table.name):
            return
        now = store.database.now(connection)
        ends = connection.scalars(select(lease_table.c.expires)).all()
    over = sum(end <= now for end in ends)
    if over:
        yield warning(f"{over} leases of writers that were cut off have run out", "`meristem store gc`")
    yield ok(f"{len(ends) - over} writers at work")


def _has(connection: Connection, table: str) -> bool:
    """Older schemas lack tables of this one."""
    return inspect(connection).has_table(table)


def _seconds(written: str) -> float:
    return datetime.fromisoformat(written).timestamp()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:19] for name in names[:_SHOWN]) + more


def _in_units(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"
