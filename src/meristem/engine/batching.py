"""Batches planned from lengths and settings alone, so that a rerun or a resumed run forms the same ones.

bf16 results depend on the composition of a batch; whoever divides, repeats or resumes the work takes whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Progress = Callable[[int, int], None]  # (done, all)


class Journal(Protocol):
    """Remembers finished batches of one run, so that a killed run resumes. Values are JSON-able."""

    def get(self, batch: int, /) -> list[Any] | None:
        """The values of batch number ``batch``; ``None`` when it is still to do."""

    def put(self, batch: int, values: list[Any], /) -> None:
        """Keep the values of a finished batch."""


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


def plan(
    lengths: Sequence[int],
    max_tokens: int,
    max_rows: int = 256,
    *,
    outputs: Sequence[int] | None = None,
    max_outputs: int | None = None,
) -> Plan:
    """Sort by length (longest first, ties by index) and cut where rows x longest would pass ``max_tokens``.

    ``outputs``: positions of each item whose logits are needed; rows x the most of them stay within ``max_outputs``.
    Longest first, so that a batch too big for the memory fails at once. An item that is over a bound by itself
    gets a batch of its own.
    """
    wanted = outputs or [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], -wanted[index], index))
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    most = 0
    for index in order:
        rows, most = len(current) + 1, max(most, wanted[index])
        full = current and rows * max(1, lengths[current[0]]) > max_tokens
        full = full or (current and max_outputs is not None and rows * most > max_outputs)
        if full or len(current) == max_rows:
            batches.append(tuple(current))
            current, most = [], wanted[index]
        current.append(index)
    if current:
        batches.append(tuple(current))
    return Plan(tuple(batches), len(lengths))


def run_batches(
    plan: Plan,
    compute: Callable[[tuple[int, ...]], list[T]],
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[T]:
    """``compute`` every batch that ``journal`` does not hold; the values in item order.

    ``compute`` gets the item indices of a batch and returns one JSON-able value each (lists, no tuples: a resumed
    run must return what an uninterrupted one does). ``progress(done items, all items)`` follows every batch.
    """
    values: list[T] = []
    for number, batch in enumerate(plan.batches):
        found = journal.get(number) if journal else None
        if found is None or len(found) != len(batch):
            found = compute(batch)
            if journal:
                journal.put(number, found)
        values += found
        if progress:
            progress(len(values), plan.count)
    return plan.restore(values)
