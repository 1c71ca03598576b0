"""Real ``meristem`` processes without paying for their imports each time, and signals at a chosen moment.

A fork server imports torch and the trainers once; each command is its own process that runs
``meristem.cli.main.main`` as the installed script does. ``moment`` names a function; when it is called for the
``nth`` time, the process sends itself ``signal`` just before (or after) it does its work.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "transformers", "trl", "peft", "datasets", "meristem.training.cit", "meristem.workspace"]


@dataclass(frozen=True)
class Moment:
    """``where`` is ``module:name`` or ``module:Class.name``."""

    where: str
    signal: int = signal.SIGINT
    nth: int = 1
    after: bool = False


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Limits:
    powerless: bool = False  # root without root's powers: it may only do what a file's owner may
    file_size: int | None = None


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class Command:
    """A ``meristem`` command under way in ``folder``'s workspace."""

    def __init__(self, folder: Path, *arguments: Any, at: Moment | None = None, limits: Limits | None = None):
        self.log = folder.parent / f"{folder.name}-process-{next(_numbers)}"
        words = ["meristem", "--workspace", str(folder), *map(str, arguments)]
        self.process = _context().Process(target=_child, args=(words, str(self.log), at, limits or Limits()))
        self.process.start()

    def wait(self) -> Done:
        self.process.join(120)
        assert self.process.exitcode is not None, "still running after two minutes"
        out, err = [Path(f"{self.log}.{name}").read_text() for name in ("out", "err")]
        return Done(self.process.exitcode, out, err)


def run(folder: Path, *arguments: Any, at: Moment | None = None, limits: Limits | None = None) -> Done:
    return Command(folder, *arguments, at=at, limits=limits).wait()


_numbers = iter(range(1_000_000))


def _child(words: list[str], log: str, at: Moment | None, limits: Limits) -> None:
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = words
    if limits.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size, limits.file_size))
    if limits.powerless and os.getuid() == 0:
        _drop_capabilities()
    if at is not None:
        _arm(at)
    from meristem.cli.main import main

    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _drop_capabilities() -> None:
    """All of them, by Linux's capset(2): to become another user would close root's own Python to the process."""
    header = struct.pack("Ii", 0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _arm(at: Moment) -> None:
    module, _, path = at.where.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != at.nth:
            return original(*args, **kwargs)
        if at.after:
            result = original(*args, **kwargs)
            os.kill(os.getpid(), at.signal)
            return result
        os.kill(os.getpid(), at.signal)
        return original(*args, **kwargs)

    setattr(owner, name, armed)
