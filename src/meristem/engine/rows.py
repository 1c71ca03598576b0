"""Which tokens go through the model, so that a context that several options share is encoded once.

A *row* is a context and a tree of option tokens behind it. A node of the tree stands for "the context, then the
tokens on the way to here"; it predicts the tokens that follow. For options ``a b c``, ``a d`` and ``e`` the nodes are
``a`` and ``a b``: the last token of an option is only ever predicted, and the first ones are predicted by the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

TAIL = 256  # nodes that one row may carry, at least: attention within a tail grows with its square


@dataclass
class Row:
    """``tokens[n]`` is node n, its parent ``parents[n]`` is a smaller index, or -1 for the end of the context.

    ``reads`` holds (pair number, node before each token of the option), one for each option scored on this row.
    ``route``: the tokens that decide which experts the row goes through, empty for a model without.
    """

    context: tuple[int, ...]
    route: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reads: list[tuple[int, list[int]]] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return len(self.context) + len(self.tokens)

    @property
    def branches(self) -> bool:
        return any(parent != node - 1 for node, parent in enumerate(self.parents))

    def add(self, number: int, option: Sequence[int]) -> None:
        """Hang ``option`` into the tree; it shares the nodes of the tokens it begins with."""
        path = [-1]
        for token in option[:-1]:
            key = (path[-1], token)
            if key not in self.children:
                self.children[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(path[-1])
            path.append(self.children[key])
        self.reads.append((number, path))


Pair = tuple[tuple[int, ...], Sequence[int], tuple[int, ...]]  # (context, option, route)


def tree_rows(pairs: Sequence[Pair]) -> list[Row]:
    """One row per distinct context and route; a new one where a tail would pass ``TAIL`` and the context's own length."""

    def room(row: Row, option: Sequence[int]) -> bool:
        return not row.tokens or len(row.tokens) + len(option) - 1 <= max(TAIL, len(row.context))

    return _rows(pairs, lambda context, _: (context, ()), room)


def chain_rows(pairs: Sequence[Pair]) -> list[Row]:
    """One row per distinct route and context + option without its last token: plain sequences, for any causal model."""
    return _rows(pairs, lambda context, option: (context, tuple(option[:-1])), lambda row, option: True)


def _rows(
    pairs: Sequence[Pair],
    key: Callable[[tuple[int, ...], Sequence[int]], tuple[tuple[int, ...], tuple[int, ...]]],
    room: Callable[[Row, Sequence[int]], bool],
) -> list[Row]:
    rows: list[Row] = []
    open_rows: dict[tuple[tuple[int, ...], ...], Row] = {}
    for number, (context, option, route) in enumerate(pairs):
        group = (*key(context, option), route)
        row = open_rows.get(group)
        if row is None or not room(row, option):
            row = open_rows[group] = Row(context, route)
            rows.append(row)
        row.add(number, option)
    return rows


@lru_cache(maxsize=8)  # the items of a task often share their options
def _tree(parents: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(T, T) bool: node n sees node m, an ancestor of it or itself; (T,) distance of each node from the context."""
    seen = np.eye(len(parents), dtype=bool)
    depth = np.zeros(len(parents), dtype=np.int64)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
            depth[node] = depth[parent] + 1
    return seen, depth


def tree_layout(rows: Sequence[Row], pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows padded on the left to width W: token ids (B, W), position ids (B, W), and who sees whom (B, W, W) bool.

    Positions go on after the context on every branch, as if the other branches were not there. Padding sees itself,
    so that no softmax is empty; nobody else sees it.
    """
    width = max(row.width for row in rows)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    seen = np.broadcast_to(np.tri(width, dtype=bool), (len(rows), width, width)).copy()
    for at, row in enumerate(rows):
        start, tail = width - row.width, width - len(row.tokens)
        ids[at, start:] = [*row.context, *row.tokens]
        positions[at, start:tail] = np.arange(len(row.context))
        seen[at, :, :start] = False
        if row.tokens:
            seen[at, tail:, tail:], depth = _tree(tuple(row.parents))
            positions[at, tail:] = len(row.context) + depth
    diagonal = np.arange(width)
    seen[:, diagonal, diagonal] = True
    return ids, positions, seen
