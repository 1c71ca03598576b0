"""Progress bars on stderr for anything that takes longer than a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_SHOW_AFTER = 1.0  # seconds: quick work shows no bar

Report = Callable[[str, int, int, str], None]


@contextmanager
def bars() -> Iterator[Report]:
    """A ``progress(what, done, total, note)`` function. Off a terminal it prints one line per finished job."""
    if not sys.stderr.isatty():
        yield _plain()
        return
    with ExitStack() as stack:
        yield _live(stack)


def _live(stack: ExitStack) -> Report:
    """Bars that stay until ``stack`` is closed; there is nothing, Rich included, before the first one is due."""
    progress: Progress | None = None
    tasks: dict[str, TaskID] = {}
    started: dict[str, float] = {}

    def report(what: str, done: int, total: int, note: str) -> None:
        nonlocal progress
        begun = started.setdefault(what, time.monotonic())
        if what not in tasks:
            if done >= total:
                started.pop(what)
                return
            if done > 0 and time.monotonic() - begun < _SHOW_AFTER:
                return
            progress = progress or stack.enter_context(_empty())
            tasks[what] = progress.add_task(what, total=total, note="")
        assert progress is not None
        progress.update(tasks[what], completed=done, total=total, note=note)
        if done >= total:
            progress.remove_task(tasks.pop(what))
            started.pop(what, None)

    return report


def _empty() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )


def _plain() -> Report:
    started: dict[str, float] = {}

    def report(what: str, done: int, total: int, note: str) -> None:
        begun = started.setdefault(what, time.monotonic())
        if done >= total:
            seconds = time.monotonic() - begun
            if seconds >= _SHOW_AFTER:
                print(
                    f"{what}: {done}/{total} in {seconds:.0f} s {note}".rstrip(), file=sys.stderr, flush=True
                )
            started.pop(what, None)

    return report
