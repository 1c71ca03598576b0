"""The stability-plasticity plane."""

from __future__ import annotations

import math
from typing import Any

from meristem.bench.lineup import JOINT, PER_TASK
from meristem.bench.plots.picture import Picture, looks, unit
from meristem.bench.summary import Group, spread


def plane(pyplot: Any, group: Group) -> tuple[Any, Picture]:
    """x: mean_i A[i,i] (learned), y: BWT (kept). ACC = x + (T-1)/T BWT, so equal ACC is a straight line."""
    figure, axis = pyplot.subplots(figsize=(7.4, 5.2))
    places = []
    for method in group.methods:
        if not method.ordered:
            continue
        colour, marker = looks(group)[method.name]
        points = [(line.plasticity, line.matrix.bwt) for line in method.lines]
        known = [(x, y) for x, y in points if x is not None and y is not None]
        if not known:
            continue
        places += known
        axis.scatter(*zip(*known, strict=True), s=22, color=colour, alpha=0.35, marker=marker, lw=0)
        middle = [spread(values) for values in zip(*known, strict=True)]
        axis.errorbar(
            middle[0].mean,
            middle[1].mean,
            xerr=middle[0].sd,
            yerr=middle[1].sd,
            color=colour,
            marker=marker,
            ms=9,
            capsize=3,
            lw=1.2,
            ls="none",
            label=f"{method.name}  (ACC {method.metric('acc').shown()})",
            zorder=3,
        )
    _frame(axis, places)
    _levels(axis, len(group.tasks))
    axis.axhline(0, color="#1b2733", lw=1)
    alone = group.method(PER_TASK)
    if alone is not None and (bound := alone.metric("acc").mean) is not None:
        axis.axvline(bound, color="#1b2733", lw=1, ls="--", label=f"{PER_TASK}: {bound:.3f}")
    axis.set_xlabel(f"plasticity: mean score right after learning ({unit(group)})")
    axis.set_ylabel("stability: BWT (below 0: forgotten)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, ncols=1)
    caption = (
        "Right is better learned, up is better kept; grey lines join equal final ACC. Large marks are means with one "
        "standard deviation, small ones single runs."
    )
    joint = group.method(JOINT)
    if joint is not None:
        caption += f" Joint training reaches ACC {joint.metric('acc').shown()}."
    return figure, Picture("plane", "Stability and plasticity", caption)


def _frame(axis: Any, places: list[tuple[float, float]]) -> None:
    """Limits around the points and zero forgetting, with room."""
    for axis_of, limits in ((0, axis.set_xlim), (1, axis.set_ylim)):
        values = [place[axis_of] for place in places] + ([0.0] if axis_of else [])
        room = 0.18 * (max(values) - min(values)) or 0.05
        limits(min(values) - room, max(values) + room)


def _levels(axis: Any, tasks: int) -> None:
    """Lines of equal ACC, labelled at the upper or right edge."""
    share = (tasks - 1) / tasks
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    if not share:
        return
    lowest, highest = left + share * bottom, right + share * top
    step = _round_step((highest - lowest) / 7)
    level = math.ceil(lowest / step) * step
    while level < highest:
        axis.plot(
            [left, right],
            [(level - left) / share, (level - right) / share],
            color="#c3ccd5",
            lw=0.9,
            zorder=0,
        )
        name, look = f"ACC {level:.2f}", {"fontsize": 8, "color": "#4f5d6b"}
        if left < (at := level - share * top) < right:
            axis.text(at, top, name, va="bottom", ha="center", **look)
        elif bottom < (at := (level - right) / share) < top:
            axis.text(right, at, f" {name}", va="center", ha="left", **look)
        level += step
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)


def _round_step(rough: float) -> float:
    scale = 10 ** math.floor(math.log10(rough))
    return float(next(step for step in (1, 2, 5, 10) if step * scale >= rough) * scale)
