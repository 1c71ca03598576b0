"""What this machine holds and can make again: training runs, evaluations under way, checked-out weights."""

from __future__ import annotations

import fcntl
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Connection, select

from meristem.ecosystem.reach import FINISHED
from meristem.store.canonical import PREFIX, digest_document
from meristem.store.files import disk_failure
from meristem.store.schema import evaluations, records
from meristem.store.store import Store

RUNS, CACHE = "runs", "cache"
MONTH = 30 * 86400  # seconds
_JOURNAL = re.compile(r"evaluation-[0-9a-f]{16}\.jsonl")
_RUN = re.compile(r"update-([0-9]{1,9})(\.lock)?")


def runs(store: Store) -> list[Path]:
    """The folders and locks of updates on this machine, whatever became of them."""
    return [path for path in _listed(store.root / RUNS) if _RUN.fullmatch(path.name)]


def stale_runs(connection: Connection, found: Iterable[Path]) -> list[Path]:
    """Those of ``runs`` whose update is finished, or is none that the store knows.

    ``found`` must have been listed before ``connection`` began its snapshot: an update is in the store before its
    folder is made.
    """
    query = select(records.c.number, records.c.status).where(records.c.kind == "update")
    status = {row.number: row.status for row in connection.execute(query)}
    return [path for path in found if status.get(_number(path), FINISHED[0]) in FINISHED]


def runs_of(found: Iterable[Path], numbers: set[int]) -> list[Path]:
    """Those of ``runs`` that belong to the updates ``numbers``."""
    return [path for path in found if _number(path) in numbers]


def stale_checkouts(store: Store, contents: Iterable[str]) -> list[Path]:
    """The cached folders of ``contents``."""
    names = {content.removeprefix(PREFIX)[:24] for content in contents}
    return [path for path in _listed(store.root / CACHE) if path.name in names]


def journal(store: Store, key: tuple[str, str, str]) -> Path:
    """Where the finished batches of an evaluation under way lie; ``key`` is its content, suite and engine."""
    return store.root / RUNS / f"evaluation-{digest_document(list(key)).removeprefix(PREFIX)[:16]}.jsonl"


def stale_journals(store: Store, connection: Connection) -> list[Path]:
    """Journals of evaluations that are in the store (left by a kill between its commit and its tidying up), and those
    that nobody went on with for a month (of weights or settings that are gone, or that failed)."""
    found = {path for path in _listed(store.root / RUNS) if _JOURNAL.fullmatch(path.name)}
    if not found:
        return []
    keys = connection.execute(select(evaluations.c.content, evaluations.c.suite, evaluations.c.engine))
    old = {path for path in found if time.time() - path.stat().st_mtime > MONTH}
    return sorted(old | found & {journal(store, tuple(row)) for row in keys})


def remove(paths: Iterable[Path]) -> int:
    """Remove what ``stale_runs`` and ``stale_checkouts`` found; a run that a process holds is left.

    Returns how many there were. Raises ``EnvironmentFailure`` when the disk refuses.
    """
    return sum(_remove(path) for path in paths)


def _number(path: Path) -> int:
    match = _RUN.fullmatch(path.name)
    return int(match[1]) if match else 0


def _remove(path: Path) -> bool:
    try:
        if _RUN.fullmatch(path.name):
            lock = path if path.suffix == ".lock" else path.with_name(f"{path.name}.lock")
            with lock.open("a+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                _drop(path)
                _drop(lock)
        else:
            _drop(path)
    except OSError as error:
        raise disk_failure(error, path) from error
    return True


def _drop(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk_failure(error, folder) from error
