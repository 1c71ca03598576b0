"""Batches planned from lengths and settings alone, so that a rerun or a resumed run forms the same ones.

bf16 results depend on the composition of a batch; whoever divides or repeats the work takes whole batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """``batches`` holds item indices; together they are a permutation of ``range(count)``."""

    batches: tuple[tuple[int, ...], ...]
    count: int

    def order(self) -> list[int]:
        """Item index at each position of the concatenated batches."""
        return [index for batch in self.batches for index in batch]

    def restore(self, values: Sequence[T]) -> list[T]:
        """Undo the plan: ``values[k]`` belongs to item ``order()[k]``; give them back in item order."""
        if len(values) != self.count:
            raise ValueError(f"{len(values)} values for {self.count} items")
        places = {index: at for at, index in enumerate(self.order())}
        return [values[places[index]] for index in range(self.count)]


def plan(lengths: Sequence[int], max_tokens: int, max_rows: int = 256) -> Plan:
    """Sort by length (longest first, ties by index) and cut where rows x longest would pass ``max_tokens``.

    Longest first, so that a batch too big for the memory fails at once. An item longer than the bound
    gets a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    for index in order:
        full = current and (len(current) + 1) * max(1, lengths[current[0]]) > max_tokens
        if full or len(current) == max_rows:
            batches.append(tuple(current))
            current = []
        current.append(index)
    if current:
        batches.append(tuple(current))
    return Plan(tuple(batches), len(lengths))
