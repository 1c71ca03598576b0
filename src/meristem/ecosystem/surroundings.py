"""What ``doctor`` looks at outside the store: permissions, the signing key, and the file system below."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warning", "problem"]
Told = tuple[Status, str, str]  # what was found, in one line, and how to mend it

KEY = "MERISTEM_KEY"
# SQLite's log beside the database lives in memory that all its users share: those of two machines do not.
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "nfs",
    "nfs4", "smb3", "smbfs",
}  # fmt: skip


def ok(text: str) -> Told:
    return "ok", text, ""


def warning(text: str, remedy: str) -> Told:
    return "warning", text, remedy


def problem(text: str, remedy: str) -> Told:
    return "problem", text, remedy


def permissions(root: Path, inner: list[Path]) -> Iterator[Told]:
    """``root`` and the files and folders ``inner`` of it: writable for us, and not for everybody."""
    places = [path for path in (root, *inner) if path.exists()]
    refused = [path for path in places if not os.access(path, os.W_OK)]
    if refused and refused == places:
        yield warning(
            f"{root} can only be read by you: what is there can be looked at and verified, not changed",
            f"`{_own(root)}`, if you should change it",
        )
    else:
        for path in refused:
            yield problem(f"{path} cannot be written by you", f"`{_own(path)}`")
    for path in places:
        if path.stat().st_mode & stat.S_IWOTH:
            yield problem(
                f"{path} can be written by every user of this machine", f"`chmod -R o-w {_quoted(path)}`"
            )
    if not refused and not any(path.stat().st_mode & stat.S_IWOTH for path in places):
        yield ok(f"{root} is yours to write, and not everybody's")


def _own(path: Path) -> str:
    if path.stat().st_uid == os.geteuid():
        return f"chmod -R u+rwX {_quoted(path)}"
    return f"sudo chown -R {os.geteuid()} {_quoted(path)}"


def signing_key(root: Path) -> Iterator[Told]:
    """The private key that the environment names: outside the workspace, and readable by its owner alone."""
    if not (named := os.environ.get(KEY)):
        return
    path = Path(named)
    if not path.exists():
        yield problem(f"{KEY} names {path}, which is not there", f"point {KEY} at the key, or unset it")
        return
    if path.resolve().is_relative_to(root.resolve()):
        yield problem(
            f"{path} lies inside the workspace: whoever can change the evidence can sign it too",
            f"`mv {_quoted(path)} ~/` and point {KEY} at it there",
        )
    elif path.stat().st_mode & 0o077:
        yield problem(f"{path} can be read by others than its owner", f"`chmod 600 {_quoted(path)}`")
    else:
        yield ok(f"{path} lies outside the workspace and is its owner's alone")


def file_system(folder: Path, mounts: Path = Path("/proc/mounts")) -> Iterator[Told]:
    """Whether a SQLite database in ``folder`` would lie on a network file system (known on Linux only)."""
    if not sys.platform.startswith("linux"):
        return
    kind = kind_of_mount(folder.resolve(), mounts.read_text())
    if kind in _NETWORK:
        yield warning(
            f"{folder} lies on a network file system ({kind}), where SQLite is safe for one machine at a time only",
            "move the workspace to a local disk, or name a PostgreSQL server in meristem.yaml (`store:`)",
        )
    else:
        yield ok(f"{folder} lies on a local file system ({kind})")


def kind_of_mount(path: Path, mounts: str) -> str:
    """The type of the file system that ``path`` lies on, by the text of ``/proc/mounts``."""
    found = (Path("/"), "unknown")
    for line in mounts.splitlines():
        _, where, kind, *_ = line.split(" ")
        point = Path(where.encode().decode("unicode_escape"))  # a space stands there as \040
        if path.is_relative_to(point) and len(point.parts) >= len(found[0].parts):
            found = (point, kind)  # the later one of two lies on top
    return found[1]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
