"""Ctrl-C during training: the first one finishes the step and saves, the second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self


class Interruption:
    """Context manager that turns SIGINT and SIGTERM into a request; ``requested`` says that one came.

    ``note`` is shown on stderr then, because the step under way is finished first.
    """

    def __init__(self, note: str = "") -> None:
        self.requested = False
        self._note = note
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._note:
            os.write(2, f"\n{self._note}\n".encode())  # print() is not safe inside a handler
