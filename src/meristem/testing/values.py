"""Small blobs with known values."""

from __future__ import annotations

import struct

from meristem.store.packs import Blob


def tensor(*values: float) -> Blob:
    """A float32 vector."""
    return Blob.tensor("F32", (len(values),), struct.pack(f"<{len(values)}f", *values))


def file(body: bytes) -> Blob:
    return Blob.file(body)


def mixed() -> list[Blob]:
    """A file of odd length, tensors of several widths, a scalar, and empty ones."""
    return [
        Blob.file(b'{"model_type": "tiny"}\n'),
        Blob.tensor("U8", (3,), b"abc"),
        Blob.tensor("BF16", (2, 2), b"\x80?" * 4),
        tensor(1.0, -0.0, 2.5),
        Blob.tensor("I64", (), struct.pack("<q", -7)),
        Blob.tensor("F32", (0, 4), b""),
        Blob.file(b""),
    ]


def sized(length: int, seed: int = 0) -> Blob:
    """A file of ``length`` bytes that do not repeat soon."""
    block = struct.pack(f"<{1 << 14}I", *((i * 2654435761 + seed) % (1 << 32) for i in range(1 << 14)))
    whole = b"".join(struct.pack("<I", i) + block for i in range(length // len(block) + 1))
    return Blob.file(whole[:length])
