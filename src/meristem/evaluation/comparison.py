"""Compare two versions on the same items, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from meristem.errors import BadInput
from meristem.evaluation.intervals import Interval
from meristem.evaluation.pairing import Pair, paired
from meristem.evaluation.results import ItemResult
from meristem.evaluation.sample import Sample, fell
from meristem.evaluation.significance import fewest, holm, mcnemar_p

SCHEMA = "meristem/comparison/v1"


@dataclass(frozen=True)
class Group:
    """The items of one task or one slice; ``flipped`` to ``pfr`` are ``None`` where ``unit`` is no share.

    ``p_worse``: one-sided, against "it got worse". ``p_adjusted``: Holm's over the slices (tasks) that have
    enough items, ``None`` where ``too_few``: so few that no outcome could be significant. ``regressed``:
    ``p_adjusted`` below 1 - confidence. ``interval``: two-sided, not adjusted, ``None`` where unproven.
    """

    name: str
    n: int
    old_score: float
    new_score: float
    difference: float
    flipped: int | None
    gained: int | None
    interval: Interval | None
    nfr: float | None
    pfr: float | None
    p_worse: float
    p_adjusted: float | None = None
    too_few: bool = False
    regressed: bool = False


@dataclass(frozen=True)
class Comparison:
    """Everything a gate or a report asks about two versions. Difference = new - old; higher is better.

    ``flipped`` / ``gained``: items (``task/id``) that went right -> wrong (negative flips) / wrong ->
    right. ``nfr`` = flipped / n, ``pfr`` = gained / n. ``variance`` is that of the per-item difference.
    Intervals are two-sided at ``confidence``; ``bounds`` gives one-sided ones. ``p_value`` is that of ``test``;
    ``mcnemar_p`` takes items as independent. ``clusters``: sources that items share (``None``: none is shared).
    ``unit``: of the scores, ``None`` for shares in [0, 1]; only shares can flip, so with a unit the flips are
    empty and their rates ``None``. ``unproven``: why ``interval`` cannot be believed; no verdict passes then.
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
    mcnemar_p: float | None
    interval: Interval
    nfr: float | None
    nfr_interval: Interval | None
    tasks: tuple[Group, ...]
    slices: tuple[Group, ...]
    seed: int
    pfr: float | None
    test: str
    p_value: float
    unit: str | None
    clusters: int | None
    design_effect: float
    unproven: str
    sample: Sample = field(repr=False, compare=False)

    @cached_property
    def bootstrap(self) -> Interval:
        """Plain BCa interval, whatever the scores."""
        return self.sample.bootstrap(self.confidence, self.seed)

    @property
    def regressed(self) -> tuple[str, ...]:
        """Slices that got worse, by Holm's correction over all of them."""
        return tuple(group.name for group in self.slices if group.regressed)

    def bounds(self, confidence: float) -> Interval:
        """One-sided lower and upper bounds of the difference, each at ``confidence``.

        Tango's for binary scores, BCa for graded ones, both aware of clusters.
        """
        check_confidence(confidence)
        return self.sample.interval(2 * confidence - 1, self.seed)

    def nfr_bounds(self, confidence: float) -> Interval:
        """One-sided Clopper-Pearson bounds of the negative-flip rate. ``BadInput`` for scores with a unit."""
        check_confidence(confidence)
        if self.unit is not None:
            raise BadInput(
                f"scores in {self.unit} are neither right nor wrong, so no item flips; use another gate"
            )
        return self.sample.flip_interval(2 * confidence - 1)

    def to_document(self) -> dict[str, Any]:
        """JSON value; per-item differences stay with the results they came from."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sample"}
        own["tasks"] = [asdict(group) for group in self.tasks]
        own["slices"] = [asdict(group) for group in self.slices]
        return {"schema": SCHEMA, **{k: _plain(v) for k, v in {**own, "bootstrap": self.bootstrap}.items()}}


def compare(
    *, old: Sequence[ItemResult], new: Sequence[ItemResult], confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Pair results by (task, id). ``BadInput`` unless both hold the same items with the same answers."""
    check_confidence(confidence)
    pairs, unit = paired(old, new)
    binary = unit is None and all(score in (0.0, 1.0) for pair in pairs for score in pair.scores)
    sample = _sample(pairs, binary, unit is None)
    share = unit is None
    flipped = tuple(pair.name for pair in pairs if share and fell(*pair.scores))
    gained = tuple(pair.name for pair in pairs if share and fell(*pair.scores[::-1]))
    whole = _group("", pairs, sample, confidence, seed)
    return Comparison(
        n=whole.n,
        old_score=whole.old_score,
        new_score=whole.new_score,
        difference=whole.difference,
        variance=sample.variance,
        binary=binary,
        flipped=flipped,
        gained=gained,
        confidence=confidence,
        mcnemar_p=mcnemar_p(len(flipped), len(gained)) if share else None,
        interval=whole.interval or sample.interval(confidence, seed),
        nfr=whole.nfr,
        nfr_interval=sample.flip_interval(confidence) if share else None,
        tasks=_groups(pairs, "task", sample, confidence, seed),
        slices=_groups(pairs, "slice", sample, confidence, seed),
        seed=seed,
        pfr=whole.pfr,
        test=sample.test,
        p_value=sample.p_value(seed),
        unit=unit,
        clusters=sample.clusters,
        design_effect=sample.design_effect,
        unproven=sample.unproven,
        sample=sample,
    )


def check_confidence(confidence: float) -> None:
    if not 0.5 < confidence < 1:
        raise BadInput(f"confidence must lie between 0.5 and 1 (for example 0.95), not {confidence}")


def _sample(pairs: Sequence[Pair], binary: bool, share: bool) -> Sample:
    return Sample.of([p.scores for p in pairs], [p.cluster for p in pairs], binary, share)


def _groups(
    pairs: Sequence[Pair], key: str, whole: Sample, confidence: float, seed: int
) -> tuple[Group, ...]:
    """Groups by name, with Holm's correction over those that have enough items to be significant."""
    members: dict[str, list[Pair]] = {}
    for pair in pairs:
        if (name := getattr(pair, key)) is not None:
            members.setdefault(name, []).append(pair)
    alpha, made = 1 - confidence, []
    for name in sorted(members):
        sample = _sample(members[name], whole.binary, whole.share)
        group = _group(name, members[name], sample, confidence, seed)
        made.append(replace(group, too_few=len(sample.blocks) < fewest(alpha)))
    asked = [group for group in made if not group.too_few]
    adjusted = {g.name: p for g, p in zip(asked, holm([g.p_worse for g in asked]), strict=True)}
    return tuple(
        replace(group, p_adjusted=adjusted[group.name], regressed=adjusted[group.name] < alpha)
        if group.name in adjusted
        else group
        for group in made
    )


def _group(name: str, pairs: Sequence[Pair], sample: Sample, confidence: float, seed: int) -> Group:
    n, share = sample.n, sample.share
    return Group(
        name=name,
        n=n,
        old_score=math.fsum(pair.scores[0] for pair in pairs) / n,
        new_score=math.fsum(pair.scores[1] for pair in pairs) / n,
        difference=math.fsum(pair.scores[1] - pair.scores[0] for pair in pairs) / n,
        flipped=sample.flipped if share else None,
        gained=sample.gained if share else None,
        interval=None if sample.unproven else sample.interval(confidence, seed),
        nfr=sample.flipped / n if share else None,
        pfr=sample.gained / n if share else None,
        p_worse=sample.p_value(seed, "less"),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
