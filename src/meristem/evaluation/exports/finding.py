"""What a comparison says about releasing, in one word, one exit code and one sentence for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meristem.evaluation.comparison import Comparison
from meristem.evaluation.exports.scales import scale
from meristem.evaluation.verdicts import Verdict, non_inferiority

Outcome = Literal["regression", "none", "unknown"]
EXIT = {"none": 0, "regression": 1, "unknown": 3}
USUAL_MARGIN = 0.02  # when nobody gave one: the loss whose exclusion is priced in items
MOST_NAMES = 4


@dataclass(frozen=True)
class Finding:
    """``places``: tasks and slices that got worse after Holm's correction. ``settle``: what would, if anything."""

    outcome: Outcome
    sentence: str
    settle: str
    places: tuple[str, ...]
    verdict: Verdict | None

    @property
    def exit_code(self) -> int:
        return EXIT[self.outcome]


def finding(comparison: Comparison, new: str, old: str, margin: float | None = None) -> Finding:
    """Regression: the whole interval lies below zero, or a task or slice fell after Holm's correction, or the
    non-inferiority verdict at ``margin`` is *fail*. Unknown: that verdict is open, or there is no interval.
    """
    verdict = None if margin is None else non_inferiority(comparison, margin)
    places = _places(comparison)
    outcome: Outcome = "none"
    if _worse(comparison) or places or (verdict and verdict.outcome == "fail"):
        outcome = "regression"
    elif comparison.unproven or (verdict and verdict.outcome == "inconclusive"):
        outcome = "unknown"
    sentence = _SENTENCES[outcome](comparison, new, old, margin, places)
    return Finding(outcome, sentence, _settle(comparison, outcome, verdict), places, verdict)


def _places(comparison: Comparison) -> tuple[str, ...]:
    """Tasks and slices that are flagged; one that holds every item is the whole, which the interval judges."""
    return tuple(
        f"{kind} {group.name}"
        for kind, groups in (("task", comparison.tasks), ("slice", comparison.slices))
        for group in groups
        if group.regressed and group.n < comparison.n
    )


def _worse(comparison: Comparison) -> bool:
    return not comparison.unproven and comparison.interval[1] < 0


def _regression(
    comparison: Comparison, new: str, old: str, margin: float | None, places: tuple[str, ...]
) -> str:
    if not _worse(comparison) and places:
        return f"{new} is worse than {old} on {_joined(places)}; over all, {_change(comparison)}."
    also = f" Certain losses: {_joined(places)}." if places else ""
    return f"{new} is worse than {old}: {_change(comparison)}, more than chance explains.{also}"


def _none(comparison: Comparison, new: str, old: str, margin: float | None, places: tuple[str, ...]) -> str:
    if comparison.interval[0] > 0 and comparison.p_value < 1 - comparison.confidence:
        return f"{new} is better than {old}: {_change(comparison)}, more than chance explains."
    if margin is not None:
        limit = scale(comparison.unit).difference(-margin).lstrip("+−")
        unit = scale(comparison.unit).difference_unit
        return f"{new} is not worse than {old} by {limit} {unit} or more: {_change(comparison)}."
    return f"No regression found: from {old} to {new} {_change(comparison)}, within what chance explains."


def _unknown(
    comparison: Comparison, new: str, old: str, margin: float | None, places: tuple[str, ...]
) -> str:
    if comparison.unproven:
        return f"Cannot tell whether {new} is worse than {old}: {comparison.unproven}."
    return f"Cannot tell whether {new} is worse than {old}: {_change(comparison)}."


_SENTENCES = {"regression": _regression, "none": _none, "unknown": _unknown}


def _change(comparison: Comparison) -> str:
    shown = scale(comparison.unit)
    before, after = shown.score(comparison.old_score), shown.score(comparison.new_score)
    unit = "" if shown.is_share else f" {shown.short}"
    if before == after:
        return f"the score stayed at {after}{unit}"
    moved = "rose" if shown.sign * comparison.difference > 0 else "fell"
    return f"the score {moved} from {before} to {after}{unit} on {comparison.n} items"


def _settle(comparison: Comparison, outcome: Outcome, verdict: Verdict | None) -> str:
    """How much is still open, and how many items would close it."""
    if outcome == "regression" or (verdict and verdict.outcome == "pass"):
        return ""
    shown, asked = scale(comparison.unit), verdict
    if verdict is None and comparison.unit is None:
        asked = non_inferiority(comparison, USUAL_MARGIN)
    open_ = ""
    if not comparison.unproven:
        loss, _ = comparison.bounds(comparison.confidence)
        if loss > 0:
            return ""
        size = f"{shown.difference(loss).lstrip('+−')} {shown.difference_unit}"
        sure = f"{comparison.confidence:.0%}, one-sided"
        open_ = f"A loss of up to {size} ({sure}) cannot be ruled out on these {comparison.n:,} items."
    if asked is None or asked.outcome != "inconclusive":
        return open_
    if asked.needed is None:
        return f"{open_} If the truth is what was observed, no number of items would settle it.".strip()
    aim = "" if verdict else f", at a margin of {100 * USUAL_MARGIN:.0f} points,"
    return f"{open_} About {asked.needed:,} items{aim} would settle it.".strip()


def _joined(places: tuple[str, ...]) -> str:
    """``task a and slices x, y and 3 more``"""
    told = []
    for kind in ("task", "slice"):
        names = [place.removeprefix(f"{kind} ") for place in places if place.startswith(f"{kind} ")]
        shown = names[:MOST_NAMES] + ([f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else [])
        if shown:
            listed = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
            told.append(f"{kind}{'s' if len(names) > 1 else ''} {listed}")
    return " and ".join(told)
