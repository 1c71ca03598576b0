"""Progress bars on stderr for anything that takes longer than a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SHOW_AFTER = 1.0  # seconds: quick work shows no bar

Report = Callable[[str, int, int, str], None]


@contextmanager
def bars() -> Iterator[Report]:
    """A ``progress(what, done, total, note)`` function. Off a terminal it prints one line per finished job."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _live(progress)


def _live(progress: Progress) -> Report:
    tasks: dict[str, TaskID] = {}
    started: dict[str, float] = {}

    def report(what: str, done: int, total: int, note: str) -> None:
        begun = started.setdefault(what, time.monotonic())
        if what not in tasks:
            if done < total and time.monotonic() - begun < _SHOW_AFTER and done > 0:
                return
            tasks[what] = progress.add_task(what, total=total, note="")
        progress.update(tasks[what], completed=done, total=total, note=note)
        if done >= total:
            progress.remove_task(tasks.pop(what))
            started.pop(what, None)

    return report


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
