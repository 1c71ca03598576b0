"""Sample and task ids that travel with a batch.

They ride as UTF-8 bytes in one uint8 tensor per column, ``(batch, longest)`` padded with zeros: tensors survive
pinning, device moves, slicing, shuffling and broadcasting by TRL and accelerate, which strings do not.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

KEYS = {"id": "meristem_id", "task": "meristem_task"}
"""Row field -> the key of its tensor in a batch."""


class TaggingCollator:
    """Strips ``id`` and ``task`` before the inner collator and adds them back as tensors under ``KEYS``.

    A collator that returns no mapping (GRPO's gives the rows themselves) gets the rows as they are.
    """

    def __init__(self, inner: Callable[[list[Any]], Any]):
        self.inner = inner

    def __call__(self, features: list[Any]) -> Any:
        if not all(isinstance(row, dict) for row in features):
            return self.inner(features)
        stripped = [{k: v for k, v in row.items() if k not in KEYS} for row in features]
        batch = self.inner(stripped)
        if not isinstance(batch, MutableMapping):
            return self.inner(features)
        batch.update(packed(features))
        return batch


def packed(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tags of ``rows`` as tensors, for the batch that is made from them."""
    return {key: encode([str(row[name]) for row in rows]) for name, key in KEYS.items() if name in rows[0]}


def pop(batch: Any) -> dict[str, list[str]]:
    """Takes the tags out of a batch: ``{"id": [...], "task": [...]}``, empty lists where there are none."""
    if isinstance(batch, MutableMapping):
        return {name: decode(batch.pop(key)) if key in batch else [] for name, key in KEYS.items()}
    return {name: [] for name in KEYS}


def encode(words: list[str]) -> Tensor:
    raw = [word.encode() for word in words]
    width = max((len(word) for word in raw), default=0)
    return torch.tensor([list(word.ljust(width, b"\0")) for word in raw], dtype=torch.uint8)


def decode(packed: Tensor) -> list[str]:
    return [bytes(row).rstrip(b"\0").decode() for row in packed.cpu().numpy()]
