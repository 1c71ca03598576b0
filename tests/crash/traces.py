"""What ``strace`` wrote, as calls; and which of them are points at which a process may die."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Every call that changes what is on disk, or says that it must be there now.
CHANGING = {
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range", "splice",
   "fsync", "fdatasync", "sync_file_range", "rename", "renameat", "renameat2", "link", "linkat",
    "symlink", "symlinkat", "unlink", "unlinkat", "truncate", "ftruncate", "fallocate", "mkdir", "mkdirat",
    "rmdir", "creat", "open", "openat", "openat2",
}  # fmt: skip
_OPENING = {"creat", "open", "openat", "openat2"}
# How often these run depends on the allocator's mood: no place in a program can be named by them.
_OF_MEMORY = {"brk", "mmap", "munmap", "mremap", "madvise", "mprotect", "futex", "getrandom"}

_LINE = re.compile(r"(?:(\d+)\s+)?(.*)")
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (.*)", re.DOTALL)
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"|<((?:[^<>\\]|\\.)+)>')
_TEMPORARY = re.compile(r"/\.([A-Za-z]*)[^/]*[0-9][^/]*$")  # such names have a random part
_PACK = re.compile(r"/[0-9a-f]{64}\.safetensors$")  # and these a salt


@dataclass(frozen=True)
class Call:
    """One system call: the ``nth`` of its name in its thread (from 1). ``paths`` are absolute."""

    thread: str
    name: str
    nth: int
    arguments: str
    result: str
    paths: tuple[str, ...]

    @property
    def executed(self) -> bool:
        """False for the call at whose entry the process died."""
        return not self.result.startswith("?")

    @property
    def succeeded(self) -> bool:
        return self.executed and not self.result.startswith("-1 ") and not self.injected

    @property
    def injected(self) -> bool:
        return "(INJECTED" in self.result

    def under(self, root: Path) -> list[str]:
        """The paths below ``root``, relative to it and without what is random in their names."""
        inside = f"{root}/"
        below = [f"/{path.removeprefix(inside)}" for path in self.paths if path.startswith(inside)]
        return [_PACK.sub("/*.safetensors", _TEMPORARY.sub(r"/.\1*", path))[1:] for path in below]

    def changes(self, root: Path) -> bool:
        """Whether the call changes or syncs something below ``root`` (or ``root`` itself)."""
        if self.name not in CHANGING or not any(
            p == str(root) or p.startswith(f"{root}/") for p in self.paths
        ):
            return False
        return self.name not in _OPENING or "O_CREAT" in self.arguments or "O_TRUNC" in self.arguments


@dataclass(frozen=True)
class Point:
    """A place to die at: the ``index``-th change of the workspace.

    ``after`` is the next call of any kind (its name and how many-eth), None when that is itself the next point: to die
    after this one and before that one is the same.
    """

    index: int
    name: str
    nth: int
    paths: tuple[str, ...]
    after: tuple[str, int] | None

    def __str__(self) -> str:
        return f"{self.index}: {self.name}({' -> '.join(self.paths)})"


def calls(text: str) -> list[Call]:
    """The calls of a trace in the order in which they began."""
    begun: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        match = _LINE.match(line)
        assert match is not None
        thread, rest = match[1] or "", match[2]
        if resumed := _RESUMED.match(rest):
            if thread in begun:
                index = begun.pop(thread)
                lines[index] = (thread, lines[index][1] + resumed[1])
        elif rest.endswith("<unfinished ...>"):
            begun[thread] = len(lines)
            lines.append((thread, rest.removesuffix("<unfinished ...>")))
        else:
            lines.append((thread, rest))
    return list(_parsed(lines))


def _parsed(lines: Iterable[tuple[str, str]]) -> Iterable[Call]:
    counts: Counter[tuple[str, str]] = Counter()
    for thread, line in lines:
        match = _CALL.match(line) or _CALL.match(f"{line}) = ?")  # cut off by the end of the process
        if match is None:
            continue  # a signal, or the end of a process
        name, arguments, result = match.groups()
        counts[thread, name] += 1
        yield Call(thread, name, counts[thread, name], arguments, result, _paths(name, arguments))


def _paths(name: str, arguments: str) -> tuple[str, ...]:
    """Absolute paths among a call's arguments: those of descriptors (``3</a/b>``) and those given by name."""
    if name in {"write", "pwrite64", "writev", "pwritev", "pwritev2"}:  # the rest is what is written
        arguments = arguments.partition(",")[0]
    relative = name.endswith(("at", "at2"))  # their descriptors are the folders of their names
    found, folder = [], ""
    for text, descriptor in _PATH.findall(arguments):
        if descriptor:
            folder = descriptor
        if descriptor and not relative:
            found.append(descriptor)
        elif text:
            found.append(text if text.startswith("/") else f"{folder}/{text}")
    return tuple(found)


def points(trace: list[Call], root: Path) -> list[Point]:
    """Every change of ``root`` in a trace of all calls."""
    found = []
    for position, call in enumerate(trace):
        if not call.changes(root):
            continue
        later = (c for c in trace[position + 1 :] if c.thread == call.thread and c.name not in _OF_MEMORY)
        following = next(later)
        after = None if following.changes(root) else (following.name, following.nth)
        found.append(Point(len(found), call.name, call.nth, tuple(call.under(root)), after))
    return found
