"""The time that a run has taken, over all the processes that worked on it."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from meristem.errors import EnvironmentFailure
from meristem.store.packs import write_file_durably


class Stopwatch:
    """Goes on from what ``path`` says, and writes there at every ``note`` and when the ``with`` ends.

    Lost is only what a process that was killed spent since its last ``note``.
    """

    def __init__(self, path: Path):
        self._path = path
        self._earlier = float(json.loads(path.read_bytes())["seconds"]) if path.exists() else 0.0
        self._started = time.monotonic()

    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._started

    def note(self) -> None:
        write_file_durably(self._path, json.dumps({"seconds": self.seconds()}).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(EnvironmentFailure):  # must not hide why the run stopped
            self.note()
