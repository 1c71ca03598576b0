"""Paired differences of one group of items, and what they say: intervals and p-values."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from meristem.evaluation.clusters import design_effect
from meristem.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    clopper_pearson,
    critical_value,
    expanded,
    tango_interval,
    widened,
)
from meristem.evaluation.significance import Alternative, mcnemar_p, sign_flip_p

RIGHT = 0.5  # a share at or above counts as right where a flip is counted
LEAST_BLOCKS = 20  # items (clusters) that a score without bounds needs before its interval is believed


class Block(NamedTuple):
    """Items that count as one draw: an item, or all items of one cluster. ``total``: summed new - old;
    ``gross``: summed |new - old|."""

    total: float
    size: int = 1
    flipped: int = 0
    gained: int = 0
    gross: float = 0.0


@dataclass(frozen=True)
class Sample:
    """Differences new - old of ``n`` items in ``blocks``. ``variance``: population variance per item.

    ``binary``: every score is 0 or 1. ``share``: scores lie in [0, 1], so that items can flip and an unseen
    item can change by no more than 1. Blocks are sorted: the order of items changes nothing.
    """

    blocks: tuple[Block, ...]
    variance: float
    binary: bool
    share: bool

    @classmethod
    def of(
        cls,
        pairs: Sequence[tuple[float, float]],
        clusters: Sequence[Hashable] | None = None,
        binary: bool = True,
        share: bool = True,
    ) -> Sample:
        """From (old, new) scores; items of one value in ``clusters`` share a source."""
        members: dict[Hashable, list[tuple[float, float]]] = {}
        for name, pair in zip(range(len(pairs)) if clusters is None else clusters, pairs, strict=True):
            members.setdefault(name, []).append(pair)
        mean = math.fsum(new - old for old, new in pairs) / len(pairs)
        variance = math.fsum((new - old - mean) ** 2 for old, new in pairs) / len(pairs)
        blocks = sorted(_block(found, share) for found in members.values())
        return cls(tuple(blocks), variance, binary, share)

    @cached_property
    def n(self) -> int:
        return sum(block.size for block in self.blocks)

    @cached_property
    def mean(self) -> float:
        return math.fsum(block.total for block in self.blocks) / self.n

    @cached_property
    def flipped(self) -> int:
        return sum(block.flipped for block in self.blocks)

    @cached_property
    def gained(self) -> int:
        return sum(block.gained for block in self.blocks)

    @cached_property
    def clusters(self) -> int | None:
        """Number of blocks; ``None`` when no two items share one."""
        return len(self.blocks) if len(self.blocks) < self.n else None

    @cached_property
    def design_effect(self) -> float:
        return self._design_effect(
            [b.total for b in self.blocks], [b.gross for b in self.blocks], self.variance
        )

    @cached_property
    def flip_design_effect(self) -> float:
        """That of the negative flips alone."""
        rate = self.flipped / self.n
        flips = [block.flipped for block in self.blocks]
        return self._design_effect(flips, flips, rate * (1 - rate))

    @property
    def unproven(self) -> str:
        """Why no interval can be believed; empty for shares, whose bounds always give one."""
        if self.share:
            return ""
        blocks = len(self.blocks)
        if blocks < LEAST_BLOCKS:
            what = "items" if self.clusters is None else "sources"
            return f"{blocks} {what} are too few for an interval of such scores (at least {LEAST_BLOCKS})"
        if self._still:
            return f"all {blocks} differences are equal, so nothing tells how much they vary"
        return ""

    def interval(self, confidence: float, seed: int) -> Interval:
        """Two-sided interval of the mean difference: Tango's for binary scores, BCa for graded ones."""
        if self.binary:
            effect = self.design_effect
            counts = self.flipped / effect, self.gained / effect, self.n / effect
            return tango_interval(*counts, confidence, self.clusters)
        found = self.bootstrap(expanded(confidence, len(self.blocks)), seed)
        if not self.share:
            return found
        z = critical_value(confidence, self.clusters)
        return widened(found, self.mean, self.n / self.design_effect, z)

    def bootstrap(self, confidence: float, seed: int) -> Interval:
        """Plain BCa interval over blocks."""
        sizes = None if self.clusters is None else [block.size for block in self.blocks]
        return bootstrap_interval([block.total for block in self.blocks], confidence, seed, sizes)

    def flip_interval(self, confidence: float) -> Interval:
        """Two-sided interval of the negative-flip rate: Clopper-Pearson; Korn and Graubard's with clusters."""
        n: float = self.n
        if self.clusters is not None:
            t = critical_value(confidence, self.clusters)
            n *= (critical_value(confidence) / t) ** 2 / self.flip_design_effect
        if n == 0:  # one cluster tells nothing
            return 0.0, 1.0
        return clopper_pearson(self.flipped / self.n * n, n, confidence)

    @property
    def test(self) -> str:
        """The name of the test behind ``p_value``."""
        if self.clusters is not None:
            return "cluster permutation"
        return "mcnemar" if self.binary else "permutation"

    def p_value(self, seed: int, alternative: Alternative = "two-sided") -> float:
        if self.test == "mcnemar":
            return mcnemar_p(self.flipped, self.gained, alternative)
        return sign_flip_p([block.total for block in self.blocks], seed, alternative)

    @property
    def _still(self) -> bool:
        ratios = [block.total / block.size for block in self.blocks]
        return min(ratios) == max(ratios)

    def _design_effect(self, sums: Sequence[float], gross: Sequence[float], variance: float) -> float:
        if self.clusters is None:
            return 1.0
        return design_effect(sums, [b.size for b in self.blocks], variance, sum(g > 0 for g in gross))


def _block(pairs: Sequence[tuple[float, float]], share: bool) -> Block:
    changes = [new - old for old, new in pairs]
    return Block(
        total=math.fsum(changes),
        size=len(pairs),
        flipped=sum(fell(old, new) for old, new in pairs) if share else 0,
        gained=sum(fell(new, old) for old, new in pairs) if share else 0,
        gross=math.fsum(map(abs, changes)),
    )


def fell(start: float, end: float) -> bool:
    """Right at ``start``, wrong at ``end``."""
    return start >= RIGHT > end
