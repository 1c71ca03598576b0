"""Inline SVG: interval bars and line charts. Texts are escaped; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

from meristem.web import wording
from meristem.web.report_decisions import SuiteComparison

Points = Sequence[tuple[float, float]]
Interval = tuple[float, float] | None


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


# A comparison on a scale that it shares with others

_SPAN = (400.0, 104.0)
_MINI = (150.0, 26.0)


def round_reach(values: Iterable[float]) -> float:
    """The half-width of an axis around zero that holds ``values``: 1, 2, 3 or 5 times a power of ten."""
    wanted = 1.05 * max((abs(value) for value in values), default=0.0)
    if wanted <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1, 1.5, 2, 3, 5, 7.5, 10) if factor * power >= wanted * 0.999)


def span(
    difference: float, interval: Interval, told: Callable[[float], str], margin: float | None = None
) -> Markup:
    """The interval of one difference, wide, with its ends in numbers; worse lies left of zero, better right."""
    values = [difference, *(interval or ()), *((-margin,) if margin else ())]
    half, (width, height), middle = round_reach(values), _SPAN, 50.0

    def x(value: float) -> float:
        return _PAD + (value + half) / (2 * half) * (width - 2 * _PAD)

    def anchor(place: float) -> str:
        return "start" if place < 50 else "end" if place > width - 50 else "middle"

    marks = [
        tag("rect", x=_PAD, y=24.0, width=x(0) - _PAD, height=52.0, class_="zone"),
        tag("rect", x=x(0), y=24.0, width=width - _PAD - x(0), height=52.0, class_="good-zone"),
        text(_PAD + 4, 37, "worse", "tick"),
        text(width - _PAD - 4, 37, "better", "tick", "end"),
        line(_PAD, 76, width - _PAD, 76, "axis"),
        *(line(x(at), 76, x(at), 81, "axis") for at in (-half, -half / 2, half / 2, half)),
        *(text(x(at), 95, told(at), "tick", anchor(x(at))) for at in (-half, -half / 2, 0.0, half / 2, half)),
        line(x(0), 20, x(0), 81, "zero"),
    ]
    if margin:
        marks += [line(x(-margin), 20, x(-margin), 76, "limit")]
        marks += [text(x(-margin), 15, f"margin {told(-margin)}", "tick", anchor(x(-margin)))]
    said = f"difference {told(difference)}"
    if interval:
        low, high = interval
        said += f", interval {told(low)} to {told(high)}"
        wide = max(2.0, x(high) - x(low))
        marks.append(tag("rect", x=x(low), y=middle - 8, width=wide, height=16.0, rx=2.5, class_="bar"))
    marks.append(tag("circle", cx=x(difference), cy=middle, r=5.0, class_="dot"))
    marks.append(text(x(difference), middle + 22, told(difference), "value", anchor(x(difference))))
    return svg(width, height, said, *marks, class_="span")


def mini_span(difference: float, interval: Interval, half: float, told: Callable[[float], str]) -> Markup:
    """One row of a table: the interval on an axis of -half to half that all rows share."""
    (width, height), middle = _MINI, 13.0

    def x(value: float) -> float:
        return 4 + (max(-half, min(half, value)) + half) / (2 * half) * (width - 8)

    marks = [line(4, middle, width - 4, middle, "axis"), line(x(0), 3, x(0), height - 3, "zero")]
    said = f"difference {told(difference)}"
    if interval:
        low, high = interval
        said += f", interval {told(low)} to {told(high)}"
        wide = max(2.0, x(high) - x(low))
        marks.append(tag("rect", x=x(low), y=middle - 5, width=wide, height=10.0, rx=2.0, class_="bar"))
    marks.append(tag("circle", cx=x(difference), cy=middle, r=3.5, class_="dot"))
    return svg(width, height, said, *marks, class_="mini")


# Calibration

_SQUARE = 190.0


def reliability(bins: Sequence[tuple[float, float, int]], name: str) -> Markup:
    """Stated confidence against share right, a dot per bin (its area grows with the items in it)."""
    left, top, size = 34.0, 8.0, 140.0
    most = max((n for *_, n in bins), default=1)

    def place(confidence: float, accuracy: float) -> tuple[float, float]:
        return left + confidence * size, top + (1 - accuracy) * size

    marks = [tag("rect", x=left, y=top, width=size, height=size, class_="frame")]
    marks.append(line(*place(0, 0), *place(1, 1), "diagonal"))
    for at in (0.0, 0.5, 1.0):
        marks.append(text(left - 5, place(0, at)[1] + 4, f"{100 * at:.0f}", "tick", "end"))
        marks.append(text(place(at, 0)[0], top + size + 15, f"{100 * at:.0f}", "tick", "middle"))
    marks.append(text(left + size / 2, top + size + 30, "stated confidence, %", "tick", "middle"))
    for confidence, accuracy, n in bins:
        cx, cy = place(confidence, accuracy)
        marks.append(tag("circle", cx=cx, cy=cy, r=2.5 + 5 * math.sqrt(n / most), class_="spot"))
    return svg(_SQUARE, _SQUARE, f"Calibration of {name}", *marks, class_="reliability")


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
