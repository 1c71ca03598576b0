"""Packs: immutable, content-addressed containers of tensors and files.

A pack is one safetensors file. Each entry is named by the digest of what it holds, so the index in the
database can be rebuilt from the packs' headers alone::

    tensor/sha256:...   a tensor with its dtype and shape      (digest: canonical.digest_tensor)
    file/sha256:...     a file's bytes, as a U8 vector         (digest: canonical.digest_bytes)

A pack becomes visible only whole: written under a temporary name, synced, renamed, its folder synced, and read
back against its digests before anybody may refer to it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from meristem.errors import EnvironmentFailure, Tampered
from meristem.store.canonical import PREFIX, digest_bytes, digest_tensor

SCHEMA = "meristem/pack/v1"
_CHUNK = 1 << 22

# Bytes per element of the safetensors dtypes that a language model uses.
DTYPE_SIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Blob:
    """Something to be stored: a tensor, or a file's bytes when ``dtype`` is None."""

    digest: str
    data: bytes | memoryview
    dtype: str | None = None
    shape: tuple[int, ...] = ()

    @classmethod
    def tensor(cls, dtype: str, shape: Iterable[int], data: bytes | memoryview) -> Blob:
        shape = tuple(shape)
        if prod(shape) * DTYPE_SIZE[dtype] != _length(data):
            raise ValueError(f"{_length(data)} bytes do not fill a tensor of {dtype} {list(shape)}")
        return cls(digest_tensor(dtype, shape, data), data, dtype, shape)

    @classmethod
    def file(cls, data: bytes) -> Blob:
        return cls(digest_bytes(data), data)

    @property
    def name(self) -> str:
        return f"{'file' if self.dtype is None else 'tensor'}/{self.digest}"

    @property
    def alignment(self) -> int:
        return DTYPE_SIZE[self.dtype] if self.dtype else 1


@dataclass(frozen=True)
class Location:
    """Where a digest's bytes lie: ``length`` bytes at absolute ``offset`` of ``pack``."""

    digest: str
    pack: str
    offset: int
    length: int
    dtype: str | None
    shape: tuple[int, ...]

    def check(self, data: bytes | memoryview) -> bool:
        if self.dtype is None:
            return digest_bytes(data) == self.digest
        return digest_tensor(self.dtype, self.shape, data) == self.digest


class Packs:
    """A folder of packs on any fsspec file system (local in this release)."""

    def __init__(self, root: Path, fs: Any | None = None):
        self.root = Path(root)
        self.fs = fs if fs is not None else LocalFileSystem()

    def write(
        self, blobs: Iterable[Blob], progress: Callable[[int, int], None] | None = None
    ) -> list[Location]:
        """Store ``blobs`` as one new pack and return where each lies; an empty list writes nothing.

        On return the bytes are durable and have been read back. Raises ``EnvironmentFailure`` when the disk
        refuses (full, read-only, I/O error). Then nothing refers to what was written: the temporary file is
        removed, and at worst (the folder would not sync) a whole pack that nobody names is left.
        """
        by_name = {blob.name: blob for blob in blobs}
        if not by_name:
            return []
        # Widest elements first, so that every tensor is aligned for whoever maps the file.
        unique = sorted(by_name.values(), key=lambda blob: -blob.alignment)
        header, offsets = _header(unique)
        pack = PREFIX + hashlib.sha256(header).hexdigest()
        locations = [
            Location(blob.digest, pack, len(header) + start, end - start, blob.dtype, blob.shape)
            for blob, (start, end) in zip(unique, offsets, strict=True)
        ]
        temporary = self.root / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            _make_folder(self.root)
            _write_synced(temporary, header, unique, progress)
            self._read_back(temporary, locations)
            temporary.replace(self.path(pack))
            _sync_folder(self.root)
        except OSError as error:
            raise disk_failure(error, self.root) from error
        finally:
            _discard(temporary)
        return locations

    def path(self, pack: str) -> Path:
        return self.root / f"{pack.removeprefix(PREFIX)}.safetensors"

    def read(self, location: Location) -> bytes:
        """The stored bytes, checked against their digest. Raises ``Tampered`` if they do not match."""
        data = self._slice(location)
        if not location.check(data):
            raise Tampered(
                f"pack {location.pack[7:19]}...: the bytes of {location.digest} do not match their digest"
            )
        return data

    def intact(self, location: Location) -> bool:
        """Whether the bytes of ``location`` are there and match their digest.

        Raises ``EnvironmentFailure`` when the disk cannot say.
        """
        try:
            return location.check(self._slice(location))
        except Tampered:
            return False

    def headers(self) -> Iterator[Location]:
        """Every entry of every pack, from the packs alone (to rebuild or check the database's index)."""
        for path in sorted(self.root.glob("*.safetensors")):
            yield from self.entries(PREFIX + path.stem)

    def entries(self, pack: str) -> Iterator[Location]:
        """Every entry of one pack. Raises ``Tampered`` unless the header is the one that names the pack."""
        path = self.path(pack)
        try:
            raw = _header_bytes(path)
        except FileNotFoundError as error:
            raise Tampered(f"{path}: the pack is missing") from error
        except ValueError as error:
            raise Tampered(f"{path}: {error}") from error
        except OSError as error:
            raise disk_failure(error, path) from error
        if digest_bytes(raw) != pack:
            raise Tampered(f"{path}: the pack's header does not match its name")
        for name, entry in json.loads(raw[8:]).items():
            if name == "__metadata__":
                continue
            kind, digest = name.split("/", 1)
            (start, end), is_tensor = entry["data_offsets"], kind == "tensor"
            dtype, shape = (entry["dtype"], tuple(entry["shape"])) if is_tensor else (None, ())
            yield Location(digest, pack, len(raw) + start, end - start, dtype, shape)

    def _slice(self, location: Location) -> bytes:
        path = self.path(location.pack)
        try:
            data: bytes = self.fs.cat_file(str(path), location.offset, location.offset + location.length)
        except FileNotFoundError as error:
            raise Tampered(f"{path}: the pack is missing") from error
        except OSError as error:
            raise disk_failure(error, path) from error
        if len(data) != location.length:
            raise Tampered(f"{path}: the pack is cut short")
        return data

    def _read_back(self, path: Path, locations: list[Location]) -> None:
        with path.open("rb") as file:
            for location in locations:
                file.seek(location.offset)
                if not location.check(file.read(location.length)):
                    raise EnvironmentFailure(
                        f"{path}: what was read back is not what was written; check the disk"
                    )


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


def _header(blobs: Iterable[Blob]) -> tuple[bytes, list[tuple[int, int]]]:
    """The safetensors header (8-byte length + padded JSON) and each blob's data offsets."""
    entries: dict[str, Any] = {"__metadata__": {"schema": SCHEMA}}
    offsets, position = [], 0
    for blob in blobs:
        length = _length(blob.data)
        shape = list(blob.shape) if blob.dtype else [length]
        entries[blob.name] = {
            "dtype": blob.dtype or "U8",
            "shape": shape,
            "data_offsets": [position, position + length],
        }
        offsets.append((position, position + length))
        position += length
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body, offsets


def _write_synced(
    path: Path, header: bytes, blobs: Iterable[Blob], progress: Callable[[int, int], None] | None
) -> None:
    blobs = list(blobs)
    total = sum(_length(b.data) for b in blobs)
    done = 0
    with path.open("xb") as file:
        file.write(header)
        for blob in blobs:
            view = memoryview(blob.data).cast("B")
            for start in range(0, len(view), _CHUNK):
                done += file.write(view[start : start + _CHUNK])
                if progress:
                    progress(done, total)
        file.flush()
        os.fsync(file.fileno())


def _length(data: bytes | memoryview) -> int:
    return memoryview(data).nbytes


def _make_folder(folder: Path) -> None:
    """Make ``folder`` if it is missing; its own entry is synced, else a crash could lose it with its packs."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)


def _discard(temporary: Path) -> None:
    """Remove a temporary file if it is there; a disk that refuses even that was reported already."""
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file_durably(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        _make_folder(path.parent)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise disk_failure(error, path) from error
    finally:
        _discard(temporary)


def safetensors_entries(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """name -> (dtype, shape, absolute offset, length in bytes) of a safetensors file, without torch.

    Raises ``ValueError`` when the file is not a complete safetensors file.
    """
    raw = _header_bytes(path)
    try:
        header = json.loads(raw[8:])
    except (ValueError, RecursionError) as error:
        raise ValueError("not a safetensors file (its header is not JSON)") from error
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file (its header is not a JSON object)")
    room = path.stat().st_size - len(raw)
    return {
        name: _checked_entry(name, entry, len(raw), room)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _header_bytes(path: Path) -> bytes:
    """The 8-byte length and the JSON header of a safetensors file. ``ValueError`` if it is cut short."""
    with path.open("rb") as file:
        first = file.read(8)
        size = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < size <= path.stat().st_size - 8:
            raise ValueError("not a safetensors file (its header is cut short)")
        return first + file.read(size)


def _checked_entry(name: str, entry: Any, data: int, room: int) -> tuple[str, tuple[int, ...], int, int]:
    """One entry of a header whose tensor bytes start at ``data`` and fill ``room``."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name} is not described as safetensors does") from error
    if not whole:
        raise ValueError(f"tensor {name} has a shape or a place that is not a whole number")
    if dtype not in DTYPE_SIZE:
        raise ValueError(f"tensor {name} has the unsupported dtype {dtype}")
    if prod(shape) * DTYPE_SIZE[dtype] != end - start or end > room:
        raise ValueError(f"tensor {name} is cut short")
    return dtype, shape, data + start, end - start
