"""The order of syncs in a trace. SIGKILL loses nothing that was written, so only the trace shows a missing sync."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tests.crash.traces import Call

_WRITES = {
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "pwritev2",
    "sendfile",
    "copy_file_range",
    "ftruncate",
    "fallocate",
}
_SYNCS = {"fsync", "fdatasync"}
_RENAMES = {"rename", "renameat", "renameat2", "link", "linkat"}
_FOLDERS = {"mkdir", "mkdirat"}
_UNLINKS = {"unlink", "unlinkat"}
LOG = "meristem.db-wal"


def problems(trace: list[Call], ws: Path, out: Path) -> list[str]:
    """What a loss of power could take from an undisturbed run. ``out`` is the file with what it told its caller.

    - a file is synced between its last write and the moment it gets its name; the folder is synced after that;
    - all of this before the database first names a pack;
    - the folders that were made for a pack are themselves synced into their parents by then;
    - the database's log is synced before the process says that it is done, and before a pack is removed.
    """
    done = [call for call in trace if call.succeeded]
    found = []
    for position, call in enumerate(done):
        if call.name in _RENAMES and call.paths[-1].startswith(f"{ws}/"):
            found += _rename(done, position, ws)
        if call.name in _UNLINKS and call.paths[-1].endswith(".safetensors"):
            found += _log_synced(done[:position], ws, f"{_short(call.paths[-1], ws)} is removed")
        if call.name == "write" and call.paths == (str(out),):
            found += _log_synced(done[:position], ws, "the process says that it is done")
    return list(dict.fromkeys(found))


def _rename(done: list[Call], position: int, ws: Path) -> list[str]:
    """What is wrong with the file that ``done[position]`` gives its name."""
    source, target = done[position].paths
    name, folder = _short(target, ws), str(Path(target).parent)
    found = []
    earlier = [c for c in done[:position] if source in c.paths]
    wrote = [c for c in earlier if c.name in _WRITES]
    if wrote and not any(c.name in _SYNCS for c in earlier[earlier.index(wrote[-1]) :]):
        found.append(f"{name} gets its name before its bytes are synced")
    deadline = _first_named(done, target)
    later = done[position:deadline]
    if not any(c.name == "fsync" and c.paths == (folder,) for c in later):
        found.append(f"{name}: its folder is not synced between the rename and the commit that names it")
    if deadline is not None and deadline < position:
        found.append(f"{name}: the database names it before it has its name")
    for index, call in enumerate(done):
        if call.name in _FOLDERS and f"{folder}/".startswith(f"{call.paths[-1]}/"):
            made = call.paths[-1]
            parent = str(Path(made).parent)
            if not any(c.name == "fsync" and c.paths == (parent,) for c in done[index:deadline]):
                found.append(f"{_short(made, ws)}/ is made, and its parent is not synced before the commit")
    return found


def _first_named(done: list[Call], pack: str) -> int | None:
    """Where the database's log first receives a row of the index that names ``pack``.

    A row starts with the blob's digest and the pack's name, one after the other.
    """
    if not pack.endswith(".safetensors") or not Path(pack).exists():
        return None
    with Path(pack).open("rb") as file:
        names = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    digests = [name.partition("/")[2] for name in names if "/" in name]
    rows = [f"{digest}sha256:{Path(pack).stem}" for digest in digests]
    for position, call in enumerate(done):
        logged = call.name in _WRITES and call.paths and call.paths[0].endswith(LOG)
        if logged and any(row in call.arguments for row in rows):
            return position
    return None


def _log_synced(done: list[Call], ws: Path, then: str) -> list[str]:
    log = [c for c in done if c.paths and c.paths[0] == f"{ws}/.meristem/{LOG}"]
    written = [c for c in log if c.name in _WRITES]
    if written and not any(c.name in _SYNCS for c in log[log.index(written[-1]) :]):
        return [f"the database's log is not synced when {then}"]
    return []


def _short(path: str, ws: Path) -> str:
    return path.removeprefix(f"{ws}/")


def unsynced(trace: list[Call], ws: Path, packs: set[str]) -> list[str]:
    """Packs of this trace that the restarted database names although they were not yet safe from a loss of power."""
    done = [call for call in trace if call.succeeded]
    found = []
    for position, call in enumerate(done):
        if call.name in _RENAMES and Path(call.paths[-1]).name in packs:
            found += [problem for problem in _rename(done, position, ws) if "the database" not in problem]
    return found
