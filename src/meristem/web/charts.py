"""Inline SVG: interval bars and line charts. Texts are escaped; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from meristem.web import wording
from meristem.web.report_decisions import SuiteComparison

Points = Sequence[tuple[float, float]]


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """One element; ``class_`` becomes ``class``, ``_`` becomes ``-``, numbers get at most one decimal."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"' for key, value in attributes.items()
    )
    return Markup(f"<{name}{pairs}>{''.join(escape(child) for child in children)}</{name}>")


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def svg(width: float, height: float, title: str, *children: str, class_: str = "") -> Markup:
    return tag(
        "svg",
        tag("title", title),
        *children,
        class_=class_,
        width=width,
        height=height,
        viewBox=f"0 0 {_plain(width)} {_plain(height)}",
        role="img",
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> Markup:
    return tag("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


# The interval of a difference

_BAR = (268.0, 62.0)
_PAD = 12.0


def reach(suite: SuiteComparison) -> float:
    """A round half-width of the axis that holds the interval and its thresholds with some air around."""
    assert suite.comparison is not None
    values = [*suite.bounds, suite.comparison.difference, *(t.value for t in suite.thresholds), 0.02]
    wanted = 1.05 * max(abs(value) for value in values)
    return next((half for half in (0.05, 0.1, 0.2, 0.3, 0.5, 0.75) if half >= wanted), 1.0)


def interval_bar(suite: SuiteComparison) -> Markup:
    """The bounds of (new - old) as a bar around zero, with the thresholds; each suite on its own scale."""
    assert suite.comparison is not None
    half = reach(suite)
    width, height = _BAR
    low, high = suite.bounds

    def x(value: float) -> float:
        return _PAD + (value + half) / (2 * half) * (width - 2 * _PAD)

    middle = 28.0
    marks: list[str] = []
    zones: list[str] = []
    for at, threshold in enumerate(suite.thresholds):
        place = x(threshold.value)
        anchor = "end" if place > width - 60 else "start" if place < 60 else "middle"
        zones.append(tag("rect", x=_PAD, y=middle - 12, width=place - _PAD, height=24.0, class_="zone"))
        lower = at % 2 == 0
        marks.append(line(place, 14, place, 44, "limit"))
        marks.append(text(place, 58 if lower else 10, threshold.words, "tick", anchor))
    bar = tag(
        "rect", x=x(low), y=middle - 7, width=max(2.0, x(high) - x(low)), height=14.0, rx=2.0, class_="bar"
    )
    dot = tag("circle", cx=x(suite.comparison.difference), cy=middle, r=4.0, class_="dot")
    ends = [
        text(_PAD, 12, wording.points(-half).removesuffix(".0"), "tick"),
        text(width - _PAD, 12, wording.points(half).removesuffix(".0"), "tick", "end"),
    ]
    axis = line(_PAD, middle, width - _PAD, middle, "axis")
    zero = [line(x(0), 16, x(0), 42, "zero")]
    if all(abs(x(t.value) - x(0)) > 85 for t in suite.thresholds[::2]):
        zero.append(text(x(0), 58, "no change", "tick", "middle"))
    told = (
        f"difference {wording.points(suite.comparison.difference)} points, "
        f"bounds {wording.points(low)} to {wording.points(high)}"
    )
    return svg(width, height, told, *zones, axis, *ends, *zero, *marks, bar, dot, class_="interval")


# Curves

_CHART = (470.0, 210.0)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 58.0, 14.0, 38.0


def line_chart(points: Points, name: str, steps: float, class_: str = "curve") -> Markup:
    """``name`` per step; axes start at zero, the horizontal one ends at ``steps`` (shared by all)."""
    top = max(y for _, y in points)
    width, height = _CHART
    ticks = nice_ticks(top)
    top, steps = max(ticks[-1], top), max(steps, 1.0)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + point[0] / steps * (width - _LEFT - _RIGHT)
        return x, height - _BOTTOM - point[1] / top * (height - _TOP - _BOTTOM)

    grid: list[str] = []
    for tick in ticks:
        _, y = place((0, tick))
        grid += [
            line(_LEFT, y, width - _RIGHT, y, "grid"),
            text(_LEFT - 7, y + 4, f"{tick:g}", "tick", "end"),
        ]
    for tick in nice_ticks(steps):
        if tick <= steps:
            grid.append(text(place((tick, 0))[0], height - _BOTTOM + 16, f"{tick:g}", "tick", "middle"))
    grid.append(text(_LEFT + (width - _LEFT - _RIGHT) / 2, height - 4, "training step", "tick", "middle"))
    placed = [place(point) for point in points]
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    (last_x, last_y), (step, value) = placed[-1], points[-1]
    marks = [
        tag("path", d=path, class_=class_),
        tag("circle", cx=last_x, cy=last_y, r=3.5, class_=f"{class_}-end"),
        text(last_x + 8, last_y + 4, f"{value:.3g}", "value"),
    ]
    told = f"{name} over {step:g} steps, from {points[0][1]:.3g} to {value:.3g}"
    return svg(width, height, told, *grid, *marks, class_="chart")


def nice_ticks(top: float, most: int = 5) -> list[float]:
    """Round numbers from zero to at least ``top``."""
    if top <= 0:
        return [0.0, 1.0]
    raw = top / (most - 1)
    scale = 10 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw * 0.999)
    count = math.ceil(top / step - 1e-9)
    return [round(step * index, 10) for index in range(count + 1)]
