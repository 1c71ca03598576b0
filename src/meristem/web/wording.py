"""How the report says things: numbers, dates and the project's technical names in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meristem.evaluation.exports.scales import Scale

OUTCOMES = {"pass": ("✓", "Passed"), "fail": ("✕", "Failed"), "inconclusive": ("?", "Inconclusive")}

GATES = {
    "non_inferiority": (
        "No loss",
        "The new version must not score worse than the champion by the margin or more.",
    ),
    "improvement": (
        "Real gain",
        "The new version must score better than the champion by more than chance explains.",
    ),
    "negative_flips": ("Few new mistakes", "Few of the items that the champion got right may be wrong now."),
    "contamination": (
        "Unseen test items",
        "Test items must not stand in what the new version was trained on.",
    ),
}

METRICS = {
    "acc": ("ACC", "average score over all learned tasks, now; higher is better"),
    "bwt": ("BWT", "change on earlier tasks since each was learned; below zero means forgetting"),
    "fwt": ("FWT", "head start on each task before it was taught, against the untrained model"),
    "forgetting": ("Forgetting", "average drop from each task's best score; zero means nothing was lost"),
}

TESTS = {
    "mcnemar": "exact McNemar test",
    "permutation": "paired permutation test",
    "cluster permutation": "permutation test over sources",
}

_NUMBERS = {
    "n": "items",
    "old_score": "champion",
    "new_score": "candidate",
    "difference": "difference",
    "flipped": "new mistakes",
    "nfr": "rate of new mistakes",
    "lower": "lower bound",
    "upper": "upper bound",
    "margin": "margin",
    "min_gain": "gain needed",
    "max_rate": "limit",
    "contaminated": "items seen in training",
    "with_answer": "with their answer",
    "max_items": "items allowed",
    "max_share": "share allowed",
    "confidence": "confidence",
    "exact": "found whole",
    "searched": "items searched",
    "rows": "training rows read",
    "unchecked_data": "data sets not read",
    "ngram": "words in a row",
    "first": "the first",
}
_COUNTS = {
    *("n", "flipped", "contaminated", "exact", "with_answer", "searched", "rows", "unchecked_data"),
    *("ngram", "max_items"),
}
_SIGNED = {"difference", "lower", "upper"}
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def points(share: float) -> str:
    """A difference of scores in points: ``-4.5``, with a real minus sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_equals(value: float) -> str:
    shown = p_value(value)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def small_duration(seconds: float) -> str:
    """``1.2 s``, ``35 ms``, ``0.4 ms``."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{figure(1000 * seconds)} ms"


def figure(value: float) -> str:
    """Three digits, thousands grouped."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def moment(time: str) -> str:
    """``2026-11-22T18:01:59.123456Z`` as ``22 Nov 2026, 18:01:59``; all times are UTC."""
    return f"{day(time)}, {time[11:19]}"


def day(time: str) -> str:
    return f"{int(time[8:10])} {_MONTHS[int(time[5:7]) - 1]} {time[:4]}"


def clipped(text: str, most: int = 700) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def gate_title(gate: str) -> str:
    return GATES[gate][0] if gate in GATES else gate.replace("_", " ")


def gate_meaning(gate: str) -> str:
    return GATES[gate][1] if gate in GATES else "a criterion of this team's own"


def gate_numbers(numbers: dict[str, Any], shown: Scale | None = None) -> list[tuple[str, str]]:
    """A gate's numbers as ``(name, value)``; names that this file does not know are shown as they are.

    ``shown``: the scale of the scores; shares unless given.
    """
    order = [key for key in _NUMBERS if key in numbers] + sorted(set(numbers) - set(_NUMBERS))
    signed = _SIGNED if "nfr" not in numbers else set()
    return [(_NUMBERS.get(key, key), _number(key, numbers[key], key in signed, shown)) for key in order]


def _number(key: str, value: Any, signed: bool, shown: Scale | None) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if key not in _NUMBERS or key in _COUNTS:
        return f"{value:,.6g}"
    if shown is not None and not shown.is_share and key != "confidence":
        if key in ("margin", "min_gain"):
            return f"{value:g} {shown.short}"
        return shown.difference(value) if signed else shown.score(value)
    return points(value) if signed else percent(value).replace(".0 %", " %")


def joined(names: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else ""
