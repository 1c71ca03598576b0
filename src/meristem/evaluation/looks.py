"""Looking at one run again and again: how sure each look must be, so that the whole run is right often enough."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meristem.errors import BadInput
from meristem.evaluation.comparison import Comparison
from meristem.evaluation.significance import PERMUTATIONS, sign_flip_p


@dataclass(frozen=True)
class Looks:
    """Looks at every ``every``-th step and at step ``last``; forgetting counts after ``patience`` significant ones in a row.

    With K looks and a patience of k, each is significant at::

        level = alpha / floor(K / k)

    and a run that loses nothing is stopped with probability at most ``alpha``: k looks in a row always hold one whose
    number is a multiple of k, there are floor(K / k) of those, and the union bound over them (Bonferroni; Dunn, JASA
    56:52, 1961) holds whatever the looks have to do with each other. Every look asks the same items about the same
    baseline, so the looks depend strongly on each other and lack the independent increments that the sharper
    bounds for accumulating data need (Pocock, Biometrika 64:191, 1977; Lan & DeMets, Biometrika 70:659, 1983).
    ``patience`` ``None``: a run that is only watched; levels are those of a patience of 1.
    """

    every: int
    last: int
    patience: int | None
    alpha: float

    @classmethod
    def over(cls, last: int, every: int | float, patience: int | None, alpha: float) -> Looks:
        """``every``: steps, or a share of ``last`` steps, rounded up. ``BadInput`` where the looks cannot work."""
        looks = cls(
            every if isinstance(every, int) else max(1, math.ceil(every * last)), last, patience, alpha
        )
        if patience is not None and looks.count < patience:
            raise BadInput(
                f"patience {patience} with {looks.count} looks in {last} steps could never stop the run; "
                "look more often (every=) or lower the patience"
            )
        if looks.level <= 1 / (PERMUTATIONS + 1):
            raise BadInput(
                f"{looks.count} looks leave each of them a level of {looks.level:.1g}, which no permutation test "
                "reaches; look less often (every=)"
            )
        return looks

    @property
    def count(self) -> int:
        return -(-self.last // self.every)

    @property
    def chances(self) -> int:
        """floor(K / k): what a p-value is multiplied by before it is held against ``alpha``."""
        return max(1, self.count // (self.patience or 1))

    @property
    def level(self) -> float:
        return self.alpha / self.chances

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.last

    def streak(self, before: int, p_value: float) -> int:
        """Significant looks in a row, after one with ``p_value`` that ``before`` of them came before."""
        return before + 1 if p_value < self.level else 0

    def enough(self, streak: int) -> bool:
        return self.patience is not None and streak >= self.patience

    def adjusted(self, p_value: float) -> float:
        """Significant where below ``alpha``."""
        return min(1.0, self.chances * p_value)


def loss_p(comparison: Comparison, margin: float) -> float:
    """One-sided p-value against "no more than ``margin`` was lost" (in the unit of the scores).

    Margin 0: the comparison's own test (exact McNemar for right or wrong). Above it the sign-flip test of the
    differences plus the margin, exact where they are symmetric around -margin and else asymptotically right
    (Romano, JASA 85:686, 1990).
    """
    sample = comparison.sample
    if margin == 0:
        return sample.p_value(comparison.seed, "less")
    return sign_flip_p(
        [block.total + margin * block.size for block in sample.blocks], comparison.seed, "less"
    )
