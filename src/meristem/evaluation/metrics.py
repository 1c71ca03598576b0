"""Continual-learning metrics of a task matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meristem.errors import BadInput

Score = float | None


@dataclass(frozen=True)
class TaskMatrix:
    """``scores[t][i]`` = A[t,i], the score on task i after learning task t (T x T); ``baseline[i]`` = b_i.

    ``None`` marks a score that was not measured. A metric that needs one is ``None`` itself, and so is a
    metric without a defined value (BWT and FWT of one task, FWT without a baseline). Signs follow the
    field: negative BWT is forgetting. Source: Lopez-Paz & Ranzato 2017; Chaudhry et al. 2018.
    """

    scores: Sequence[Sequence[Score]]
    baseline: Sequence[Score] | None = None

    def __post_init__(self) -> None:
        rows = tuple(tuple(row) for row in self.scores)
        object.__setattr__(self, "scores", rows)
        if self.baseline is not None:
            object.__setattr__(self, "baseline", tuple(self.baseline))
        if not rows or any(len(row) != len(rows) for row in rows):
            raise BadInput(
                f"a task matrix is square: {len(rows)} rows of {[len(row) for row in rows]} scores"
            )
        if self.baseline is not None and len(self.baseline) != len(rows):
            raise BadInput(f"{len(self.baseline)} baseline scores for {len(rows)} tasks")
        values = [v for row in (*rows, self.baseline or ()) for v in row if v is not None]
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
        """``mean_{i>1} (A[i-1,i] - b_i)``"""
        if self.baseline is None:
            return None
        baseline = self.baseline
        return _mean([_minus(self.scores[i - 1][i], baseline[i]) for i in range(1, len(self.scores))])

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
        }


def _minus(left: Score, right: Score) -> Score:
    return None if left is None or right is None else left - right


def _mean(values: list[Score]) -> Score:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
