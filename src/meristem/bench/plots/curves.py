"""Scores over the stream: one panel per task, one for the mean of the tasks learned so far."""

from __future__ import annotations

import math
from typing import Any

from meristem.bench.lineup import PER_TASK
from meristem.bench.plots.picture import Picture, looks, unit
from meristem.bench.summary import Group, Line, Method, Spread, spread


def curves(pyplot: Any, group: Group, order: str, tasks: list[str]) -> tuple[Any, Picture]:
    """One panel per task and one for the mean over the tasks learned so far; x: how many are learned."""
    panels = [*tasks, None]
    columns = min(3, len(panels)) if len(panels) <= 6 else 4
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.5 * columns, 2.7 * rows + 0.5), sharey=True, squeeze=False
    )
    steps = list(range(len(tasks) + 1))
    for axis, task in zip(axes.flat, panels, strict=False):
        for method in group.methods:
            if lines := method.in_order(order):
                _curve(axis, method, steps, _values(lines, tasks, task), looks(group)[method.name])
        if task is not None:
            axis.axvline(tasks.index(task) + 1, color="#8796a5", lw=1, ls=":")
            _bound(axis, group.method(PER_TASK), task)
        axis.set_title(task or "mean of the tasks learned", fontsize=10, loc="left", weight="bold")
        axis.set_xticks(steps if len(steps) <= 9 else steps[::3])
        axis.set_xlim(-0.2, len(tasks) + 0.2)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("tasks learned", fontsize=10)
    figure.supylabel(unit(group), fontsize=10)
    _legend(figure, axes.flat[0])
    figure.tight_layout()
    caption = (
        f"Score on each task after each update; the dotted line is where the task is learned, 0 the untrained model. "
        f"Bands are one standard deviation over seeds. Order {order}: {', '.join(tasks)}."
    )
    return figure, Picture(f"curves-order{order}", f"Score over the stream, order {order}", caption)


def _values(lines: list[Line], tasks: list[str], task: str | None) -> list[Spread]:
    """Per step the spread over runs of one task's score, or of the mean over the tasks learned by then."""
    steps = range(len(tasks) + 1)
    if task is not None:
        return [spread(line.score_at(step, task) for line in lines) for step in steps]
    learned = [
        [_mean([line.score_at(step, each) for each in tasks[:step]]) for line in lines] for step in steps
    ]
    return [spread(values) for values in learned]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _curve(axis: Any, method: Method, steps: list[int], values: list[Spread], look: tuple[str, str]) -> None:
    colour, marker = look
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value.mean is not None]
    x = [step for step, _ in known]
    y = [value.mean for _, value in known]
    axis.plot(x, y, color=colour, marker=marker, ms=4.5, lw=1.8, label=method.name)
    if any(value.sd for _, value in known):
        low = [value.mean - (value.sd or 0.0) for _, value in known if value.mean is not None]
        high = [value.mean + (value.sd or 0.0) for _, value in known if value.mean is not None]
        axis.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)


def _bound(axis: Any, alone: Method | None, task: str) -> None:
    if alone is not None and (score := alone.last_score(task).mean) is not None:
        axis.axhline(score, color="#1b2733", lw=1, ls="--", label=f"{PER_TASK} (trained alone)")


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    rows = math.ceil(len(labels) / 3)
    figure.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=math.ceil(len(labels) / rows),
        frameon=False,
    )
