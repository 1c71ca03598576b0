"""Files on a local disk: durable writes, reads in pieces, and one line for a disk that refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from meristem.errors import EnvironmentFailure

_PIECE = 1 << 20  # stays in the processor's cache between reading, hashing and writing
_local = threading.local()


def disk_failure(error: OSError, where: Path) -> EnvironmentFailure:
    """One line for an operating-system error while reading or writing the workspace."""
    remedy = {
        errno.ENOSPC: "free some space and repeat the command",
        errno.EDQUOT: "the quota is used up; free some space and repeat the command",
        errno.EFBIG: "a file-size limit was reached; raise it and repeat the command",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "no permission; check the owner and mode of the workspace",
    }.get(error.errno or 0, "check the disk and repeat the command")
    return EnvironmentFailure(f"{where}: {error.strerror or error}; {remedy}")


def write_file_durably(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write ``data`` (in one or in many parts) to ``path``; a reader sees the old file or the whole new one.

    Raises ``EnvironmentFailure`` when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        make_folder(path.parent)
        with temporary.open("xb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_failure(error, path) from error
    finally:
        discard(temporary)


def make_folder(folder: Path) -> None:
    """Make ``folder`` if it is missing, and every one above it.

    Each new entry is synced, else a crash could lose it with all that lies in it.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(temporary: Path) -> None:
    """Remove a temporary file if it is there; a disk that refuses even that was reported already."""
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def pieces(descriptor: int, offset: int, length: int) -> Iterator[memoryview]:
    """``length`` bytes of a file from ``offset`` on, fewer where it ends.

    Each piece lies in memory of the calling thread (nobody can change it between a check and a write) and is
    overwritten by the next one.
    """
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(bytearray(_PIECE))
    buffer: memoryview = _local.buffer
    while length:
        got = os.preadv(descriptor, [buffer[: min(_PIECE, length)]], offset)
        if not got:
            return
        yield buffer[:got]
        offset, length = offset + got, length - got


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of ``data`` at ``offset``, however many calls the system needs for it."""
    rest = memoryview(data)
    while len(rest):
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
