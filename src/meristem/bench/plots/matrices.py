"""Task matrices of all methods side by side."""

from __future__ import annotations

import math
from typing import Any

from meristem.bench.plots.picture import Picture, unit
from meristem.bench.summary import Group, Line, spread


def matrices(pyplot: Any, group: Group, order: str, tasks: list[str]) -> tuple[Any, Picture]:
    """A[t, i] of every method, mean over seeds: rows are what was learned last, columns what is asked."""
    shown = [(method, lines) for method in group.methods if (lines := method.in_order(order))]
    size = max(2.9, 0.62 * len(tasks) + 0.9)
    columns = max(1, min(len(shown), int(14 // size)))
    rows = math.ceil(len(shown) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(size * columns, (size + 0.5) * rows), squeeze=False
    )
    every = [_cells(lines, tasks) for _, lines in shown]
    known = [value for cells in every for row in cells for value in row if value is not None]
    low, high = min(known), max(known)
    for axis, (method, _), cells in zip(axes.flat, shown, every, strict=False):
        _matrix(axis, cells, ["untrained", *tasks], tasks, low, high)
        axis.set_title(method.name.replace("+", "\n+ "), fontsize=9, loc="left", weight="bold")
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    figure.tight_layout()
    caption = (
        "Row: the task learned last; column: the task asked. Below the diagonal stands what is kept of earlier tasks, "
        f"above it what later tasks get for free. Mean over seeds, {unit(group)}."
    )
    return figure, Picture(f"matrix-order{order}", f"Task matrix, order {order}", caption)


def _cells(lines: list[Line], tasks: list[str]) -> list[list[float | None]]:
    return [
        [spread(line.score_at(step, task) for line in lines).mean for task in tasks]
        for step in range(len(tasks) + 1)
    ]


def _matrix(
    axis: Any, cells: list[list[float | None]], rows: list[str], columns: list[str], low: float, high: float
) -> None:
    values = [[math.nan if value is None else value for value in row] for row in cells]
    axis.imshow(values, cmap="Blues", vmin=low - 0.15 * (high - low), vmax=high, aspect="auto")
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if value is not None:
                dark = (value - low) / ((high - low) or 1) > 0.45
                axis.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="#ffffff" if dark else "#1b2733",
                    weight="bold" if y == x + 1 else "normal",
                )
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.grid(False)
    axis.tick_params(length=0)
    axis.axhline(0.5, color="#ffffff", lw=4)
    for side in axis.spines.values():
        side.set_visible(False)
