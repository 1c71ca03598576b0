"""Leak check: test items whose whole input stands in the training data. ``matching`` finds parts of it as well."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from meristem.data.formats import fold, normalized_text


def leaks(
    train_rows: Iterable[Mapping[str, Any]], test_items: Iterable[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """``(train id, test id)`` for every pair with the same normalised input text.

    ``test_items`` are rows with ``prompt`` or ``messages`` (as ``Suite.test_rows()`` gives them); an
    optional ``source`` holds the raw input before a prompt template, which is compared as well. Time and
    memory grow with train + test + pairs; only 16-byte hashes are kept. Order: training rows, then items.
    """
    wanted: dict[bytes, list[str]] = {}
    for item in test_items:
        for key in dict.fromkeys(_keys(item)):
            wanted.setdefault(key, []).append(str(item["id"]))
    found: dict[tuple[str, str], None] = {}
    for row in train_rows:
        for test_id in wanted.get(_hash(normalized_text(dict(row))), ()):
            found[str(row["id"]), test_id] = None
    return list(found)


def _keys(item: Mapping[str, Any]) -> list[bytes]:
    texts = [input_text(item)] + ([fold(item["source"])] if item.get("source") else [])
    return [_hash(text) for text in texts if text]


def input_text(item: Mapping[str, Any]) -> str:
    """What a test item asks, folded, without system messages; "" where it holds no text."""
    messages = item.get("messages")
    if messages and messages[-1]["role"] != "assistant":  # a test item's messages have no answer to cut
        return normalized_text({"prompt": list(messages)})
    return normalized_text(dict(item))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
