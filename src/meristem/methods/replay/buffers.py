"""Which rows of a stream are kept: two buffers with one interface.

A buffer holds raw rows, each with an ``id`` and a ``task``. Every random choice is a hash of the seed and the
position in the stream, so a buffer is a function of what it has seen and its state is plain JSON.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import Any, Protocol

from meristem.errors import BadInput
from meristem.methods.base import Row


class Buffer(Protocol):
    """What a replay method needs of a buffer."""

    def add(self, rows: Iterable[Row]) -> None: ...

    def rows(self) -> list[Row]: ...

    def discard(self, ids: Iterable[str]) -> int: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


def _uniform(n: int, *key: Any) -> int:
    """A whole number in [0, n) that depends on ``key`` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % n  # 128 bits: the modulo bias is below 2^-90 for any real stream


def _checked(row: Row) -> Row:
    if not isinstance(row.get("id"), str) or not isinstance(row.get("task"), str):
        raise BadInput(f"a replay buffer holds rows with a text 'id' and 'task', not {sorted(row)}")
    return dict(row)


class ReservoirBuffer:
    """A uniform sample of the whole stream (Vitter 1985, algorithm R).

    The n-th row (1-based) is kept while n <= capacity; after that it replaces slot j with j uniform in [0, n)
    when j < capacity. Every row seen is then held with probability capacity / n. State: ``capacity`` rows.

    A saved reservoir can go on with a smaller capacity (a uniform sample of it is kept), but not with a larger
    one once it has dropped rows: those it would need to stay uniform are gone.
    """

    kind = "reservoir"

    def __init__(self, capacity: int, seed: int = 0):
        self.capacity, self.seed = capacity, seed
        self.seen = 0
        self._rows: list[Row] = []

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.seen += 1
            _offer(self._rows, _checked(row), self.seen, self.capacity, (self.seed,))

    def rows(self) -> list[Row]:
        return [dict(row) for row in self._rows]

    def discard(self, ids: Iterable[str]) -> int:
        """Forgets the rows with these ids (a privacy request); returns how many were held."""
        wanted, held = set(ids), len(self._rows)
        self._rows = [row for row in self._rows if row["id"] not in wanted]
        return held - len(self._rows)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "capacity": self.capacity, "seen": self.seen, "rows": self.rows()}

    def load(self, state: dict[str, Any]) -> None:
        _same_kind(state, self.kind)
        seen, before = int(state["seen"]), int(state["capacity"])
        if self.capacity > before and seen > before:
            raise BadInput(
                f"the saved reservoir kept {before} of {seen} rows and cannot grow to capacity={self.capacity}: "
                f"keep capacity={before} or less"
            )
        self.seen = seen
        rows = [_checked(row) for row in state["rows"]]
        self._rows = _sample(rows, self.capacity, f"{self.seed}/{self.capacity}/{seen}")


class TaskBalancedBuffer:
    """An equal share of the buffer for each task, and a uniform sample of the task within its share.

    With T tasks the quota is capacity // T, one more for the first capacity % T tasks. A task that arrives
    shrinks the others: each drops rows at random, which leaves a uniform sample of what it saw. State:
    ``capacity`` rows in all, whatever the number of tasks.

    A saved buffer can go on with another capacity. A larger one leaves room for tasks to come and for those that
    have dropped no row yet; a task that has keeps the number of rows it holds, because more would not be uniform.
    """

    kind = "task-balanced"

    def __init__(self, capacity: int, seed: int = 0):
        self.capacity, self.seed = capacity, seed
        self.seen: dict[str, int] = {}
        self._thinned: set[str] = set()  # tasks that have dropped rows for want of room
        self._rows: dict[str, list[Row]] = {}

    def quota(self, task: str) -> int:
        """How many rows of ``task`` may be held now."""
        place, tasks = list(self.seen).index(task), len(self.seen)
        return self.capacity // tasks + (1 if place < self.capacity % tasks else 0)

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            row = _checked(row)
            task = row["task"]
            if task not in self.seen:
                self.seen[task], self._rows[task] = 0, []
                self._shrink()
            self.seen[task] += 1
            held, n = self._rows[task], self.seen[task]
            room = len(held) if task in self._thinned else self.quota(task)
            if n > room:
                self._thinned.add(task)
            _offer(held, row, n, room, (self.seed, task))

    def rows(self) -> list[Row]:
        return [dict(row) for held in self._rows.values() for row in held]

    def discard(self, ids: Iterable[str]) -> int:
        """Forgets the rows with these ids (a privacy request); returns how many were held."""
        wanted, held = set(ids), len(self.rows())
        self._rows = {t: [r for r in rows if r["id"] not in wanted] for t, rows in self._rows.items()}
        return held - len(self.rows())

    def state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "seen": dict(self.seen),
            "order": list(self.seen),
            "thinned": sorted(self._thinned),
            "rows": self.rows(),
        }

    def load(self, state: dict[str, Any]) -> None:
        _same_kind(state, self.kind)
        # JSON written with sorted keys loses the order in which tasks arrived, so it stands apart.
        self.seen = {task: int(state["seen"][task]) for task in state["order"]}
        self._thinned = set(state["thinned"])
        self._rows = {task: [] for task in self.seen}
        for row in state["rows"]:
            self._rows[row["task"]].append(_checked(row))
        self._shrink()

    def _shrink(self) -> None:
        for task, held in self._rows.items():
            quota = self.quota(task)
            if len(held) > quota:
                self._thinned.add(task)
                key = f"{self.seed}/{task}/{len(self.seen)}/{self.seen[task]}"
                self._rows[task] = _sample(held, quota, key)


def _offer(held: list[Row], row: Row, n: int, capacity: int, key: tuple[Any, ...]) -> None:
    """One step of algorithm R: ``row`` is the ``n``-th of its stream."""
    if len(held) < capacity and n <= capacity:
        held.append(row)
    elif (slot := _uniform(n, *key, n)) < len(held):
        held[slot] = row


def _sample(rows: list[Row], count: int, key: str) -> list[Row]:
    """``count`` of ``rows`` in their order, every choice equally likely; all of them when they are no more."""
    if len(rows) <= count:
        return rows
    return [rows[i] for i in sorted(random.Random(key).sample(range(len(rows)), count))]


def _same_kind(state: dict[str, Any], kind: str) -> None:
    if state.get("kind") != kind:
        raise BadInput(
            f"the saved buffer is {state.get('kind')!r}, this one {kind!r}: keep buffer={state.get('kind')!r}"
        )


BUFFERS: dict[str, type[ReservoirBuffer] | type[TaskBalancedBuffer]] = {
    "reservoir": ReservoirBuffer,
    "task-balanced": TaskBalancedBuffer,
}
