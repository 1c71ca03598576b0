"""Canonical bytes and digests: the only place where anything is hashed into an identity."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import rfc8785

PREFIX = "sha256:"


def canonical(document: Any) -> bytes:
    """RFC 8785 (JSON Canonicalization Scheme) bytes of a JSON value.

    Raises ``ValueError`` for NaN, infinities and integers beyond 2**53, which JSON cannot carry safely.
    """
    return rfc8785.dumps(document)


def parse(body: bytes) -> Any:
    return json.loads(body)


def digest_bytes(data: bytes | memoryview) -> str:
    """``sha256:<hex>`` of raw bytes, the same number that ``sha256sum`` prints."""
    return PREFIX + hashlib.sha256(data).hexdigest()


def digest_document(document: Any) -> str:
    """Digest of a JSON value: SHA-256 of its canonical bytes."""
    return digest_bytes(canonical(document))


def digest_tensor(dtype: str, shape: tuple[int, ...] | list[int], data: bytes | memoryview) -> str:
    """Digest of a tensor: safetensors dtype name, shape and little-endian bytes.

    The same values under another name, in another file or beside other tensors have the same digest.
    """
    h = tensor_hash(dtype, shape)
    h.update(data)
    return PREFIX + h.hexdigest()


def tensor_hash(dtype: str, shape: tuple[int, ...] | list[int]) -> hashlib._Hash:
    """The hash behind ``digest_tensor``, waiting for the tensor's bytes (to be fed piece by piece)."""
    return hashlib.sha256(f"meristem/tensor/v1 {dtype} {','.join(map(str, shape))}\n".encode())


def short(digest: str) -> str:
    """First 12 hex digits, for people."""
    return digest.removeprefix(PREFIX)[:12]
