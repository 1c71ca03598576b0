"""Does a model's probability of its answer tell how often the answer is right?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meristem.errors import BadInput
from meristem.evaluation.results import ItemResult

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Items whose probability of the answer given lies in (low, high]; means over them, ``None`` for none."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """``ece`` = sum over bins of n_bin / n * |accuracy - confidence|. ``n``: items with option probabilities."""

    ece: float
    n: int
    confidence: float
    accuracy: float
    bins: tuple[Bin, ...]

    def to_document(self) -> dict[str, Any]:
        return {**asdict(self), "bins": [asdict(found) for found in self.bins]}


def probabilities(logprobs: Mapping[str, float]) -> dict[str, float]:
    """Softmax over the options' log-likelihoods."""
    highest = max(logprobs.values())
    raised = {option: math.exp(value - highest) for option, value in logprobs.items()}
    total = math.fsum(raised.values())
    return {option: value / total for option, value in raised.items()}


def calibration(results: Sequence[ItemResult], bins: int = BINS) -> Calibration | None:
    """Expected calibration error over equal-width bins (Guo et al., ICML 2017) of the items whose
    ``detail["logprobs"]`` gives option log-likelihoods; ``None`` when no item has them, or when scores are no shares.

    The confidence of an item is the probability of the option it answered (``prediction``).
    """
    points = [
        (_confidence(row), row["score"])
        for row in results
        if row["detail"].get("logprobs") and "unit" not in row
    ]
    if not points:
        return None
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for point in points:
        members[max(0, math.ceil(point[0] * bins) - 1)].append(point)
    made = tuple(_bin(index, bins, found) for index, found in enumerate(members))
    gaps = [
        b.n * abs(b.accuracy - b.confidence)
        for b in made
        if b.accuracy is not None and b.confidence is not None
    ]
    n = len(points)
    return Calibration(
        ece=math.fsum(gaps) / n,
        n=n,
        confidence=math.fsum(confidence for confidence, _ in points) / n,
        accuracy=math.fsum(right for _, right in points) / n,
        bins=made,
    )


def _bin(index: int, bins: int, points: list[tuple[float, float]]) -> Bin:
    low, high, n = index / bins, (index + 1) / bins, len(points)
    if not n:
        return Bin(low, high, 0, None, None)
    confidence = math.fsum(confidence for confidence, _ in points) / n
    return Bin(low, high, n, confidence, math.fsum(right for _, right in points) / n)


def _confidence(row: ItemResult) -> float:
    logprobs = row["detail"]["logprobs"]
    if row["prediction"] not in logprobs or not all(math.isfinite(value) for value in logprobs.values()):
        raise BadInput(
            f"item {row['task']}/{row['id']}: no finite log-likelihood for its prediction among the options; "
            "evaluate the suite again"
        )
    return min(1.0, probabilities(logprobs)[row["prediction"]])
