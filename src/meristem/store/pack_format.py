"""The format of a pack, which is one safetensors file: what goes in, where it lies, what a header says.

Each entry is named by the digest of what it holds, so the index in the database can be rebuilt from the
packs' headers alone::

    tensor/sha256:...   a tensor with its dtype and shape      (digest: canonical.digest_tensor)
    file/sha256:...     a file's bytes, as a U8 vector         (digest: canonical.digest_bytes)

A pack is named by the SHA-256 of its header. The header follows from the set of blobs and the salt, so the same blobs
under the same salt are the same pack, byte for byte. In a store every writer has a salt of its own, so that no name is
ever used again; a bundle has none, so that it is the same wherever it was made.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from meristem.store.canonical import PREFIX, digest_bytes, digest_tensor, tensor_hash

SCHEMA = "meristem/pack/v1"
_ENTRY = re.compile(r"(tensor|file)/(sha256:[0-9a-f]{64})")
_PACK = re.compile(r"sha256:[0-9a-f]{64}")

# Bytes per element of the safetensors dtypes that a language model uses.
DTYPE_SIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

# name -> (dtype, shape, absolute offset, length in bytes)
Entries = dict[str, tuple[str, tuple[int, ...], int, int]]


class _Entry:
    """What its digest and its type say about an entry, with or without its bytes."""

    digest: str
    dtype: str | None

    @property
    def name(self) -> str:
        return f"{'file' if self.dtype is None else 'tensor'}/{self.digest}"

    @property
    def alignment(self) -> int:
        return DTYPE_SIZE[self.dtype] if self.dtype else 1


@dataclass(frozen=True)
class Blob(_Entry):
    """Something to be stored: a tensor, or a file's bytes when ``dtype`` is None."""

    digest: str
    data: bytes | memoryview
    dtype: str | None = None
    shape: tuple[int, ...] = ()

    @classmethod
    def tensor(cls, dtype: str, shape: Iterable[int], data: bytes | memoryview) -> Blob:
        """Raises ``ValueError`` unless ``data`` fills a tensor of that dtype and shape."""
        shape = tuple(shape)
        length = memoryview(data).nbytes
        if prod(shape) * DTYPE_SIZE[dtype] != length:
            raise ValueError(f"{length} bytes do not fill a tensor of {dtype} {list(shape)}")
        return cls(digest_tensor(dtype, shape, data), data, dtype, shape)

    @classmethod
    def file(cls, data: bytes) -> Blob:
        return cls(digest_bytes(data), data)

    @property
    def length(self) -> int:
        return memoryview(self.data).nbytes


@dataclass(frozen=True)
class Location(_Entry):
    """Where a digest's bytes lie: ``length`` bytes at absolute ``offset`` of ``pack``."""

    digest: str
    pack: str
    offset: int
    length: int
    dtype: str | None
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + self.length

    def check(self, *pieces: bytes | memoryview) -> bool:
        """Whether ``pieces``, one after the other, are the bytes that the digest names."""
        return self.check_pieces(pieces)

    def check_pieces(self, pieces: Iterable[bytes | memoryview]) -> bool:
        """As ``check``, without holding more than one piece."""
        running = self.hash()
        for piece in pieces:
            running.update(piece)
        return PREFIX + running.hexdigest() == self.digest

    def hash(self) -> hashlib._Hash:
        """The hash whose value over the stored bytes is ``digest``."""
        return hashlib.sha256() if self.dtype is None else tensor_hash(self.dtype, self.shape)


E = TypeVar("E", Blob, Location, Blob | Location)


@dataclass(frozen=True)
class Layout:
    """A pack before it is written: its name, its header, and its blobs with the place of each."""

    pack: str
    header: bytes
    blobs: list[Blob]
    locations: list[Location]

    @property
    def size(self) -> int:
        return len(self.header) + sum(location.length for location in self.locations)


def layout(blobs: Iterable[Blob], salt: str = "") -> Layout:
    """How ``blobs`` lie in a pack of their own; one that is given twice lies there once."""
    unique = _in_order(blobs)
    header, starts = _pack_header(unique, salt)
    pack = digest_bytes(header)
    locations = [
        Location(blob.digest, pack, start, blob.length, blob.dtype, blob.shape)
        for blob, start in zip(unique, starts, strict=True)
    ]
    return Layout(pack, header, unique, locations)


def name_of(entries: Iterable[Blob | Location], salt: str = "") -> str:
    """The name that a pack of exactly ``entries`` has."""
    return digest_bytes(_pack_header(_in_order(entries), salt)[0])


def _in_order(entries: Iterable[E]) -> list[E]:
    """Each entry once; widest elements first, so that every tensor is aligned for whoever maps the file."""
    by_name = {entry.name: entry for entry in entries}
    return sorted(by_name.values(), key=lambda entry: (-entry.alignment, entry.name))


def _pack_header(entries: Iterable[Blob | Location], salt: str) -> tuple[bytes, list[int]]:
    described = (
        (entry.name, entry.dtype or "U8", entry.shape if entry.dtype else (entry.length,))
        for entry in entries
    )
    return encode_header(described, {"schema": SCHEMA, **({"salt": salt} if salt else {})})


def is_pack_name(name: str) -> bool:
    return _PACK.fullmatch(name) is not None


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, list[int]]:
    """A safetensors header for ``(name, dtype, shape)`` in that order, and each tensor's absolute offset."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    starts, position = [], 0
    for name, dtype, shape in tensors:
        end = position + prod(shape) * DTYPE_SIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        starts.append(position)
        position = end
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    header = struct.pack("<Q", len(body)) + body
    return header, [len(header) + start for start in starts]


def header_length(first: bytes, size: int) -> int:
    """How long the header is of a file of ``size`` bytes that begins with the eight bytes ``first``.

    Raises ``ValueError`` when the file cannot hold it.
    """
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 0 < length <= size - 8:
        raise ValueError("not a safetensors file (its header is cut short)")
    return 8 + int(length)


def decode_header(raw: bytes, size: int) -> Entries:
    """The entries of a safetensors file of ``size`` bytes with header ``raw``.

    Raises ``ValueError`` when they are not described as safetensors does or do not fit into the file.
    """
    try:
        header = json.loads(raw[8:])
    except (ValueError, RecursionError) as error:
        raise ValueError("not a safetensors file (its header is not JSON)") from error
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file (its header is not a JSON object)")
    room = size - len(raw)
    return {
        name: _checked_entry(name, entry, len(raw), room)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def pack_entries(pack: str, raw: bytes, size: int) -> list[Location]:
    """Every entry of the pack of ``size`` bytes whose header is ``raw``.

    Raises ``ValueError`` unless the header is the one that names the pack and tells of every byte after it.
    """
    if digest_bytes(raw) != pack:
        raise ValueError("the pack's header does not match its name")
    locations = []
    for name, (dtype, shape, offset, length) in decode_header(raw, size).items():
        if not (entry := _ENTRY.fullmatch(name)):
            raise ValueError(f"the pack holds '{name}', which names no digest")
        is_tensor = entry[1] == "tensor"
        locations.append(
            Location(entry[2], pack, offset, length, dtype if is_tensor else None, shape if is_tensor else ())
        )
    if len(raw) + sum(location.length for location in locations) != size:
        raise ValueError("the pack is longer or shorter than its header says")
    return locations


def safetensors_entries(path: Path) -> Entries:
    """The tensors of a safetensors file, without torch.

    Raises ``ValueError`` when the file is not a complete safetensors file.
    """
    raw, size = read_header(path)
    return decode_header(raw, size)


def read_header(path: Path) -> tuple[bytes, int]:
    """The header (its 8-byte length included) and the size of a safetensors file.

    Raises ``ValueError`` if it is cut short.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        first = file.read(8)
        raw = first + file.read(header_length(first, size) - 8)
    return raw, size


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
