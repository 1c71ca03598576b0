"""Compare two versions on the same items, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from meristem.errors import BadInput
from meristem.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    clopper_pearson,
    mcnemar_p,
    tango_interval,
    z_value,
)
from meristem.evaluation.results import ItemResult

SCHEMA = "meristem/comparison/v1"
RIGHT = 0.5  # a score at or above counts as right where a flip is counted
Key = tuple[str, str]


@dataclass(frozen=True)
class Group:
    """The items of one task or one slice. ``interval`` is Tango's, ``None`` for graded scores."""

    name: str
    n: int
    old_score: float
    new_score: float
    difference: float
    flipped: int
    gained: int
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """Everything a gate or a report asks about two versions. Difference = new - old.

    ``flipped`` / ``gained``: items (``task/id``) that went right -> wrong (negative flips) / wrong ->
    right. ``nfr`` = flipped / n. ``variance`` is that of the per-item difference. Intervals are two-sided
    at ``confidence``; ``bounds`` gives one-sided ones.
    """

    n: int
    old_score: float
    new_score: float
    difference: float
    variance: float
    binary: bool
    flipped: tuple[str, ...]
    gained: tuple[str, ...]
    confidence: float
    mcnemar_p: float
    interval: Interval
    bootstrap: Interval
    nfr: float
    nfr_interval: Interval
    tasks: tuple[Group, ...]
    slices: tuple[Group, ...]
    seed: int = 0
    differences: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def bounds(self, confidence: float) -> Interval:
        """One-sided lower and upper bounds of the difference, each at ``confidence``.

        Tango's for binary scores, BCa for graded ones.
        """
        check_confidence(confidence)
        return _difference_interval(self.differences, self.binary, 2 * confidence - 1, self.seed)

    def nfr_bounds(self, confidence: float) -> Interval:
        """One-sided Clopper-Pearson bounds of the negative-flip rate."""
        check_confidence(confidence)
        return clopper_pearson(len(self.flipped), self.n, 2 * confidence - 1)

    def to_document(self) -> dict[str, Any]:
        """JSON value; per-item differences stay with the results they came from."""
        document = {key: _plain(value) for key, value in asdict(self).items() if key != "differences"}
        return {"schema": SCHEMA, **document}


def compare(
    *, old: Sequence[ItemResult], new: Sequence[ItemResult], confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Pair results by (task, id). ``BadInput`` unless both hold the same items with the same answers."""
    check_confidence(confidence)
    before, after = _by_key(old, "old"), _by_key(new, "new")
    _check_same(before, after)
    keys = list(before)  # the order of the old results; sums are exact, so the order changes nothing
    pairs = [(before[key]["score"], after[key]["score"]) for key in keys]
    binary = all(score in (0.0, 1.0) for pair in pairs for score in pair)
    whole = _group("", pairs, binary, confidence)
    differences = tuple(sorted(b - a for a, b in pairs))
    mean = whole.difference
    flipped = tuple("/".join(key) for key, pair in zip(keys, pairs, strict=True) if _fell(*pair))
    gained = tuple("/".join(key) for key, pair in zip(keys, pairs, strict=True) if _fell(*pair[::-1]))
    bootstrap = bootstrap_interval(differences, confidence, seed)
    return Comparison(
        n=whole.n,
        old_score=whole.old_score,
        new_score=whole.new_score,
        difference=mean,
        variance=math.fsum((d - mean) ** 2 for d in differences) / len(differences),
        binary=binary,
        flipped=flipped,
        gained=gained,
        confidence=confidence,
        mcnemar_p=mcnemar_p(len(flipped), len(gained)),
        interval=whole.interval or bootstrap,
        bootstrap=bootstrap,
        nfr=len(flipped) / whole.n,
        nfr_interval=clopper_pearson(len(flipped), whole.n, confidence),
        tasks=_groups(keys, [key[0] for key in keys], pairs, binary, confidence),
        slices=_groups(keys, [before[key]["slice"] for key in keys], pairs, binary, confidence),
        seed=seed,
        differences=differences,
    )


def required_items(
    diff: float, variance: float, margin: float, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Items that would settle "is new worse than old by ``margin`` or more?" if ``diff`` is the truth.

    The lower bound passes -margin once ``n >= variance (z_conf + z_power)^2 / (diff + margin)^2``; when
    ``diff`` is negative the upper bound may fall below 0 first, at the same formula with ``|diff|``. Never
    fewer than ``z^2 (1 - g) / g`` for the gap g, which is what Tango's interval needs even without any
    discordant pair. ``None`` when neither gap exists, so that no number of items settles it.
    """
    check_confidence(confidence)
    gaps = [gap for gap in (diff + margin, -diff) if gap > 1e-12]
    return min((items_for_gap(gap, variance, confidence, power) for gap in gaps), default=None)


def items_for_gap(gap: float, variance: float, confidence: float, power: float = 0.8) -> int:
    """Items after which a one-sided bound clears a distance ``gap`` with probability ``power``."""
    z = z_value(confidence)
    normal = variance * (z + z_value(power)) ** 2 / gap**2
    agreement = z * z * max(0.0, 1 - gap) / gap
    return max(1, math.ceil(max(normal, agreement)) + 1)


def check_confidence(confidence: float) -> None:
    if not 0.5 < confidence < 1:
        raise BadInput(f"confidence must lie between 0.5 and 1 (for example 0.95), not {confidence}")


def _by_key(results: Sequence[ItemResult], name: str) -> dict[Key, ItemResult]:
    found = {(result["task"], result["id"]): result for result in results}
    if not found:
        raise BadInput(f"the {name} results are empty; there is nothing to compare")
    if len(found) != len(results):
        raise BadInput(f"the {name} results hold an item twice; evaluate the suite again")
    bad = next((key for key, result in found.items() if not math.isfinite(result["score"])), None)
    if bad is not None:
        raise BadInput(f"the {name} score of item {'/'.join(bad)} is not a finite number")
    return found


def _check_same(before: dict[Key, ItemResult], after: dict[Key, ItemResult]) -> None:
    different = before.keys() ^ after.keys()
    if different:
        shown = ", ".join("/".join(key) for key in sorted(different)[:5])
        raise BadInput(
            f"not the same items: {len(different)} stand in one result only ({shown}); "
            "evaluate both versions on the same suite"
        )
    changed = next((key for key in before if before[key]["answer"] != after[key]["answer"]), None)
    if changed:
        raise BadInput(f"item {'/'.join(changed)} has two different answers; evaluate both on the same suite")


def _fell(start: float, end: float) -> bool:
    return start >= RIGHT > end


def _groups(
    keys: Sequence[Key],
    names: Iterable[str | None],
    pairs: Sequence[tuple[float, float]],
    binary: bool,
    confidence: float,
) -> tuple[Group, ...]:
    members: dict[str, list[tuple[float, float]]] = {}
    for name, pair in zip(names, pairs, strict=True):
        if name is not None:
            members.setdefault(name, []).append(pair)
    return tuple(_group(name, members[name], binary, confidence) for name in sorted(members))


def _group(name: str, pairs: Sequence[tuple[float, float]], binary: bool, confidence: float) -> Group:
    n = len(pairs)
    flipped = sum(_fell(*pair) for pair in pairs)
    gained = sum(_fell(*pair[::-1]) for pair in pairs)
    return Group(
        name=name,
        n=n,
        old_score=math.fsum(a for a, _ in pairs) / n,
        new_score=math.fsum(b for _, b in pairs) / n,
        difference=math.fsum(b - a for a, b in pairs) / n,
        flipped=flipped,
        gained=gained,
        interval=tango_interval(flipped, gained, n, confidence) if binary else None,
    )


def _difference_interval(
    differences: Sequence[float], binary: bool, confidence: float, seed: int
) -> Interval:
    if not binary:
        return bootstrap_interval(differences, confidence, seed)
    flipped = sum(d < 0 for d in differences)
    gained = sum(d > 0 for d in differences)
    return tango_interval(flipped, gained, len(differences), confidence)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
