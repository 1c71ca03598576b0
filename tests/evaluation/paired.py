"""Result rows for the tests of the paired statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meristem.evaluation.comparison import Comparison, compare
from meristem.evaluation.sample import Block, Sample


def results(
    scores: Any, slices: Any = None, task: str = "t", clusters: Any = None, unit: str | None = None
) -> list[Any]:
    rows = []
    for i, score in enumerate(scores):
        row = {"task": task, "id": str(i), "slice": slices[i] if slices else None, "score": float(score)}
        row |= {"prediction": "p", "answer": "a", "detail": {}}
        if clusters is not None and clusters[i] is not None:
            row["cluster"] = clusters[i]
        if unit is not None:
            row["unit"] = unit
        rows.append(row)
    return rows


def counts(flipped: int, gained: int, n: int) -> Comparison:
    """A comparison with these discordant pairs; the rest right in both."""
    same = [1] * (n - flipped - gained)
    old, new = [1] * flipped + [0] * gained, [0] * flipped + [1] * gained
    return compare(old=results(old + same), new=results(new + same))


TEMPLATE = counts(0, 0, 1)


def quick_counts(flipped: int, gained: int, n: int) -> Comparison:
    """What ``counts`` gives as far as verdicts look, without rows: for simulations."""
    blocks = [Block(-1.0, 1, 1, 0, 1.0)] * flipped + [Block(0.0)] * (n - flipped - gained)
    blocks += [Block(1.0, 1, 0, 1, 1.0)] * gained
    mean = (gained - flipped) / n
    variance = (gained + flipped) / n - mean**2
    return replace(
        TEMPLATE,
        n=n,
        old_score=(n - gained) / n,
        new_score=(n - flipped) / n,
        difference=mean,
        flipped=("",) * flipped,
        gained=("",) * gained,
        sample=Sample(tuple(blocks), variance, True, True),
    )
