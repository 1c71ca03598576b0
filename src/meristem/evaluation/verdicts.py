"""What a comparison proves: pass, fail or inconclusive. Pure functions; gates add policy around them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from meristem.errors import BadInput
from meristem.evaluation.comparison import Comparison, items_for_gap, required_items
from meristem.evaluation.intervals import clopper_pearson

Outcome = Literal["pass", "fail", "inconclusive"]
MOST_ITEMS = 10_000_000


@dataclass(frozen=True)
class Verdict:
    """``needed``: items that would settle an inconclusive verdict if the truth is what was observed;
    ``None`` when settled already, or when no number of items would."""

    outcome: Outcome
    reason: str
    numbers: dict[str, float]
    needed: int | None = None

    @property
    def passed(self) -> bool:
        return self.outcome == "pass"

    def to_document(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "reason": self.reason,
            "numbers": self.numbers,
            "needed": self.needed,
        }


def non_inferiority(comparison: Comparison, margin: float, confidence: float = 0.95) -> Verdict:
    """*pass* when the one-sided lower bound of (new - old) lies above -margin; else *fail* when the
    one-sided upper bound lies below 0; else *inconclusive*."""
    _check_share("margin", margin)
    lower, upper = comparison.bounds(confidence)
    numbers = _numbers(comparison, lower, upper, confidence) | {"margin": margin}
    told = _told(comparison, lower, upper, confidence)
    if lower > -margin:
        return Verdict("pass", f"not worse by {_points(margin)} points: {told}", numbers)
    if upper < 0:
        return Verdict("fail", f"worse than before: {told}", numbers)
    needed = required_items(comparison.difference, comparison.variance, margin, confidence)
    return _unsettled(
        f"cannot rule out a loss of {_points(margin)} points: {told}", numbers, needed, comparison.n
    )


def improvement(comparison: Comparison, min_gain: float = 0.0, confidence: float = 0.95) -> Verdict:
    """*pass* when the one-sided lower bound of (new - old) lies above ``min_gain``; *fail* when the upper
    bound lies below it; else *inconclusive*."""
    _check_share("min_gain", min_gain)
    lower, upper = comparison.bounds(confidence)
    numbers = _numbers(comparison, lower, upper, confidence) | {"min_gain": min_gain}
    told = _told(comparison, lower, upper, confidence)
    if lower > min_gain:
        return Verdict("pass", f"better by more than {_points(min_gain)} points: {told}", numbers)
    if upper < min_gain:
        return Verdict("fail", f"not better by {_points(min_gain)} points: {told}", numbers)
    gap = abs(comparison.difference - min_gain)
    needed = items_for_gap(gap, comparison.variance, confidence) if gap > 1e-12 else None
    text = f"a gain of more than {_points(min_gain)} points is not shown: {told}"
    return _unsettled(text, numbers, needed, comparison.n)


def negative_flips(comparison: Comparison, max_rate: float, confidence: float = 0.95) -> Verdict:
    """*pass* when the one-sided Clopper-Pearson upper bound of the negative-flip rate is at most
    ``max_rate``; *fail* when the lower bound is above it; else *inconclusive*."""
    _check_share("max_rate", max_rate)
    lower, upper = comparison.nfr_bounds(confidence)
    flips, n = len(comparison.flipped), comparison.n
    numbers = {
        "n": n,
        "flipped": flips,
        "nfr": comparison.nfr,
        "lower": lower,
        "upper": upper,
        "confidence": confidence,
        "max_rate": max_rate,
    }
    told = (
        f"{flips} of {n} items went from right to wrong ({comparison.nfr:.2%}, {confidence:.4g} one-sided "
        f"bounds {lower:.2%} to {upper:.2%}, limit {max_rate:.2%})"
    )
    if upper <= max_rate:
        return Verdict("pass", told, numbers)
    if lower > max_rate:
        return Verdict("fail", told, numbers)
    return _unsettled(told, numbers, _flip_items(comparison.nfr, max_rate, confidence), n)


def _flip_items(rate: float, max_rate: float, confidence: float) -> int | None:
    """Smallest n (to 1 %) at which the observed rate would be settled; ``None`` if not below 10 million."""

    def settled(n: int) -> bool:
        lower, upper = clopper_pearson(round(rate * n), n, 2 * confidence - 1)
        return upper <= max_rate or lower > max_rate

    high = 1
    while not settled(high):
        high *= 2
        if high > MOST_ITEMS:
            return None
    low = high // 2
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return high


def _unsettled(text: str, numbers: dict[str, float], needed: int | None, n: int) -> Verdict:
    if needed is None:
        return Verdict("inconclusive", f"{text}; no number of items would settle this difference", numbers)
    needed = max(needed, n + 1)
    return Verdict(
        "inconclusive", f"{text}; about {needed} items would settle it (there are {n})", numbers, needed
    )


def _numbers(comparison: Comparison, lower: float, upper: float, confidence: float) -> dict[str, float]:
    return {
        "n": comparison.n,
        "old_score": comparison.old_score,
        "new_score": comparison.new_score,
        "difference": comparison.difference,
        "lower": lower,
        "upper": upper,
        "confidence": confidence,
    }


def _told(comparison: Comparison, lower: float, upper: float, confidence: float) -> str:
    return (
        f"{comparison.old_score:.2%} -> {comparison.new_score:.2%} on {comparison.n} items, difference "
        f"{_points(comparison.difference, '+')} points, {confidence:.4g} one-sided bounds "
        f"{_points(lower, '+')} to {_points(upper, '+')}"
    )


def _points(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.2f}"


def _check_share(name: str, value: float) -> None:
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise BadInput(f"{name} is a share between 0 and 1 (0.02 means two points), not {value}")
