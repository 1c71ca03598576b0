"""Finished batches of an evaluation under way, so that a killed one goes on where it was.

One JSON line per batch with a checksum; a line torn by a kill or a full disk ends the journal there. It holds
results of one (content, suite, engine) and is removed when those are in the store.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from meristem.store.files import disk_failure


@dataclass(frozen=True)
class Part:
    """The batches of one pass over a task; see ``engine.batching.Journal``."""

    file: JournalFile
    name: str

    def get(self, batch: int) -> list[Any] | None:
        return self.file.known.get((self.name, batch))

    def put(self, batch: int, values: list[Any]) -> None:
        self.file.append(self.name, batch, values)


class JournalFile:
    """An open journal, held by one process; without ``file`` it keeps nothing."""

    def __init__(self, path: Path, file: FileIO | None):
        self.path, self._file = path, file
        self._opened, self._before = time.monotonic(), 0.0
        self.known: dict[tuple[str, int], list[Any]] = {}
        if file is None:
            return
        sound = 0
        for part, batch, values, seconds, end in _sound_lines(path):
            self.known[part, batch] = values
            self._before, sound = seconds, end
        file.truncate(sound)
        file.seek(0, os.SEEK_END)

    def part(self, name: str) -> Part:
        return Part(self, name)

    def start(self) -> None:
        """Computing begins now; what came before (loading a model) is not counted."""
        self._opened = time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent on all batches so far, by this process and by those that were cut off before."""
        return self._before + time.monotonic() - self._opened

    def append(self, part: str, batch: int, values: list[Any]) -> None:
        if self._file is None:
            return
        body = json.dumps([part, batch, values, round(self.seconds, 3)]).encode()
        line = memoryview(b"%08x %s\n" % (zlib.crc32(body), body))
        try:
            while line:  # a full disk may take a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise disk_failure(error, self.path) from error


@contextmanager
def journal_at(path: Path) -> Iterator[JournalFile]:
    """The journal at ``path``, made if missing and removed when the block ends well.

    One that keeps nothing while another process holds it: then this one computes by itself.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: what could not be written must not be tried again when the file is closed
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise disk_failure(error, path) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield JournalFile(path, None)
            return
        yield JournalFile(path, file)
        path.unlink(missing_ok=True)


def _sound_lines(path: Path) -> Iterator[tuple[str, int, list[Any], float, int]]:
    """``(part, batch, values, seconds so far, offset of the next line)`` up to the first line that is not whole."""
    at = 0
    with path.open("rb") as file:
        for line in file:
            at += len(line)
            checksum, _, body = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum.decode("ascii", "replace") != f"{zlib.crc32(body):08x}":
                return
            part, batch, values, seconds = json.loads(body)
            yield part, batch, values, seconds, at
