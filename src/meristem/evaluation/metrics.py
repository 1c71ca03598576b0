"""Continual-learning metrics: of a task matrix, and across stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meristem.errors import BadInput

Score = float | None


@dataclass(frozen=True)
class TaskMatrix:
    """``scores[t][i]`` = A[t,i], the score on task i after learning task t (T x T); ``baseline[i]`` = b_i, before
    any training; ``single[i]`` = s_i, of a model trained on task i alone from the same start.

    ``None`` marks a score that was not measured. A metric that needs one is ``None`` itself, and so is a
    metric without a defined value (BWT and FWT of one task, FWT without a baseline). Signs follow the
    field: negative BWT is forgetting. Source: Lopez-Paz & Ranzato 2017; Chaudhry et al. 2018.
    """

    scores: Sequence[Sequence[Score]]
    baseline: Sequence[Score] | None = None
    single: Sequence[Score] | None = None

    def __post_init__(self) -> None:
        rows = tuple(tuple(row) for row in self.scores)
        object.__setattr__(self, "scores", rows)
        if not rows or any(len(row) != len(rows) for row in rows):
            raise BadInput(
                f"a task matrix is square: {len(rows)} rows of {[len(row) for row in rows]} scores"
            )
        for name in ("baseline", "single"):
            beside = getattr(self, name)
            if beside is not None:
                object.__setattr__(self, name, tuple(beside))
                if len(beside) != len(rows):
                    raise BadInput(f"{len(beside)} {name} scores for {len(rows)} tasks")
        rows += (tuple(self.baseline or ()), tuple(self.single or ()))
        values = [v for row in rows for v in row if v is not None]
        if not all(math.isfinite(value) for value in values):
            raise BadInput("a task matrix holds finite numbers, or None where nothing was measured")

    @property
    def acc(self) -> Score:
        """``mean_i A[T,i]``"""
        return _mean(list(self.scores[-1]))

    @property
    def bwt(self) -> Score:
        """``mean_{i<T} (A[T,i] - A[i,i])``; negative = forgetting."""
        return _mean([_minus(self.scores[-1][i], self.scores[i][i]) for i in range(len(self.scores) - 1)])

    @property
    def fwt(self) -> Score:
        """``mean_{i>1} (A[i-1,i] - b_i)``: what earlier tasks gave a task before it was learned."""
        if self.baseline is None:
            return None
        baseline = self.baseline
        return _mean([_minus(self.scores[i - 1][i], baseline[i]) for i in range(1, len(self.scores))])

    @property
    def fwt_trained(self) -> Score:
        """``mean_{i>1} (A[i,i] - s_i)``: what earlier tasks gave a task once it was learned (the reading of SAPT
        and others)."""
        if self.single is None:
            return None
        single = self.single
        return _mean([_minus(self.scores[i][i], single[i]) for i in range(1, len(self.scores))])

    @property
    def fwt_printed(self) -> Score:
        """``1/(T-1) sum_{i=2}^{T-1} (A[T,i] - b_i)``: the formula as some surveys print it, which mixes transfer and
        forgetting and leaves out the last task. For quoting them only."""
        if self.baseline is None or len(self.scores) < 2:
            return None
        baseline, last = self.baseline, len(self.scores) - 1
        gains = [_minus(self.scores[-1][i], baseline[i]) for i in range(1, last)]
        known = [gain for gain in gains if gain is not None]
        return math.fsum(known) / last if len(known) == len(gains) else None

    @property
    def forgetting(self) -> Score:
        """``mean_i (max_t A[t,i] - A[T,i])``; scores from before task i count where they were measured."""
        tasks = range(len(self.scores))
        if any(self.scores[t][i] is None for i in tasks for t in tasks if t >= i):
            return None
        best = [max(v for row in self.scores if (v := row[i]) is not None) for i in tasks]
        return _mean([_minus(best[i], self.scores[-1][i]) for i in tasks])

    def to_document(self) -> dict[str, Any]:
        return {
            "scores": [list(row) for row in self.scores],
            "baseline": None if self.baseline is None else list(self.baseline),
            "acc": self.acc,
            "bwt": self.bwt,
            "fwt": self.fwt,
            "forgetting": self.forgetting,
            "single": None if self.single is None else list(self.single),
            "fwt_trained": self.fwt_trained,
            "fwt_printed": self.fwt_printed,
        }


def mean_delta(first: Sequence[Score], last: Sequence[Score]) -> Score:
    """``mean_i (R[t,i] - R[0,i])`` over suites of one kind: GAD on general, IFD on instruction, SD on safety
    suites. Negative = lost. ``None`` without suites or where a score is missing."""
    return _mean([_minus(after, before) for before, after in zip(first, last, strict=True)])


def _minus(left: Score, right: Score) -> Score:
    return None if left is None or right is None else left - right


def _mean(values: list[Score]) -> Score:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
