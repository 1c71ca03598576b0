"""What a comparison proves: pass, fail or inconclusive. Pure functions; gates add policy around them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from meristem.errors import BadInput
from meristem.evaluation.comparison import Comparison
from meristem.evaluation.exports.scales import scale
from meristem.evaluation.power import Question, flip_items_needed, items_needed
from meristem.evaluation.sample import LEAST_BLOCKS

Outcome = Literal["pass", "fail", "inconclusive"]
UNITS = {None: "points", "bits_per_byte": "bits per byte", "nats": "nats"}


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
    one-sided upper bound lies below 0; else *inconclusive*. ``margin`` is in the unit of the scores."""
    _check_amount("margin", margin, comparison)
    lower, upper = comparison.bounds(confidence)
    numbers = _numbers(comparison, lower, upper, confidence) | {"margin": margin}
    question = Question(-margin, 0.0, confidence)
    told = _told(comparison, lower, upper, confidence)
    if comparison.unproven:
        return _unproven(comparison, numbers, question)
    if lower > -margin:
        return Verdict("pass", f"not worse by {_amount(margin, comparison)}: {told}", numbers)
    if upper < 0:
        return Verdict("fail", f"worse than before: {told}", numbers)
    text = f"cannot rule out a loss of {_amount(margin, comparison)}: {told}"
    return _unsettled(text, numbers, items_needed(comparison.sample, question), comparison.n)


def improvement(comparison: Comparison, min_gain: float = 0.0, confidence: float = 0.95) -> Verdict:
    """*pass* when the one-sided lower bound of (new - old) lies above ``min_gain``; *fail* when the upper
    bound lies below it; else *inconclusive*. ``min_gain`` is in the unit of the scores."""
    _check_amount("min_gain", min_gain, comparison)
    lower, upper = comparison.bounds(confidence)
    numbers = _numbers(comparison, lower, upper, confidence) | {"min_gain": min_gain}
    question = Question(min_gain, min_gain, confidence)
    told = _told(comparison, lower, upper, confidence)
    if comparison.unproven:
        return _unproven(comparison, numbers, question)
    if lower > min_gain:
        return Verdict("pass", f"better by more than {_amount(min_gain, comparison)}: {told}", numbers)
    if upper < min_gain:
        return Verdict("fail", f"not better by {_amount(min_gain, comparison)}: {told}", numbers)
    text = f"a gain of more than {_amount(min_gain, comparison)} is not shown: {told}"
    return _unsettled(text, numbers, items_needed(comparison.sample, question), comparison.n)


def negative_flips(comparison: Comparison, max_rate: float, confidence: float = 0.95) -> Verdict:
    """*pass* when the one-sided Clopper-Pearson upper bound of the negative-flip rate is at most
    ``max_rate``; *fail* when the lower bound is above it; else *inconclusive*. ``BadInput`` for scores with
    a unit: nothing flips there."""
    _check_share("max_rate", max_rate)
    lower, upper = comparison.nfr_bounds(confidence)
    flips, n = len(comparison.flipped), comparison.n
    rate = flips / n
    numbers = {
        "n": n,
        "flipped": flips,
        "nfr": rate,
        "lower": lower,
        "upper": upper,
        "confidence": confidence,
        "max_rate": max_rate,
    }
    told = (
        f"{flips} of {n} items went from right to wrong ({rate:.2%}, {confidence:.4g} one-sided "
        f"bounds {lower:.2%} to {upper:.2%}, limit {max_rate:.2%})"
    )
    if upper <= max_rate:
        return Verdict("pass", told, numbers)
    if lower > max_rate:
        return Verdict("fail", told, numbers)
    return _unsettled(told, numbers, flip_items_needed(comparison.sample, max_rate, confidence), n)


def _unproven(comparison: Comparison, numbers: dict[str, float], question: Question) -> Verdict:
    few = len(comparison.sample.blocks) < LEAST_BLOCKS
    needed = items_needed(comparison.sample, question) if few else None
    return _unsettled(comparison.unproven, numbers, needed, comparison.n)


def _unsettled(text: str, numbers: dict[str, float], needed: int | None, n: int) -> Verdict:
    if needed is None:
        return Verdict("inconclusive", f"{text}; no number of items would settle this difference", numbers)
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
    sources = "" if comparison.clusters is None else f" from {comparison.clusters} sources"
    low, high = (lower, upper) if _sign(comparison) > 0 else (upper, lower)
    bounds = f"{confidence:.4g} one-sided bounds {_signed(low, comparison)} to {_signed(high, comparison)}"
    return (
        f"{_score(comparison.old_score, comparison)} -> {_score(comparison.new_score, comparison)} on "
        f"{comparison.n} items{sources}, difference {_signed(comparison.difference, comparison)} "
        f"{UNITS[comparison.unit]}, {bounds}"
    )


def _score(value: float, comparison: Comparison) -> str:
    return f"{value:.2%}" if comparison.unit is None else f"{_sign(comparison) * value:.4f}"


def _signed(value: float, comparison: Comparison) -> str:
    return f"{100 * value:+.2f}" if comparison.unit is None else f"{_sign(comparison) * value:+.4f}"


def _sign(comparison: Comparison) -> int:
    """-1 where people read the quantity the other way round: fewer bits per byte are better."""
    return scale(comparison.unit).sign


def _amount(value: float, comparison: Comparison) -> str:
    number = f"{100 * value:.2f}" if comparison.unit is None else f"{value:g}"
    return f"{number} {UNITS[comparison.unit]}"


def _check_amount(name: str, value: float, comparison: Comparison) -> None:
    if comparison.unit is None:
        _check_share(name, value)
    elif not math.isfinite(value) or value < 0:
        raise BadInput(f"{name} is a number of {UNITS[comparison.unit]}, 0 or more, not {value}")


def _check_share(name: str, value: float) -> None:
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise BadInput(f"{name} is a share between 0 and 1 (0.02 means two points), not {value}")
