"""Items that share a source are not independent: the design effect of clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence


def ratio_design_effect(sums: Sequence[float], sizes: Sequence[int], variance: float) -> float:
    """Variance of the mean as clusters give it over what ``n`` independent items would give.

    With y_j the sum and m_j the size of cluster j, n = sum m_j and mean d = sum y_j / n::

        v = J / (J - 1) * sum_j (y_j - m_j d)^2 / n^2        (Taylor variance of the ratio)
        design effect = n v / variance

    ``variance``: per item (p (1 - p) for shares). Needs two clusters and a positive variance. Source: Rao &
    Scott, Biometrics 48 (1992), 577-585, whose effective counts are the counts divided by it.
    """
    n, clusters = sum(sizes), len(sizes)
    mean = math.fsum(sums) / n
    residuals = math.fsum((y - m * mean) ** 2 for y, m in zip(sums, sizes, strict=True))
    return clusters / (clusters - 1) * residuals / n / variance


def design_effect(sums: Sequence[float], sizes: Sequence[int], variance: float, informative: int) -> float:
    """Rao and Scott's design effect, at least 1, cautious where few clusters speak about it.

    ``informative``: clusters in which anything changed. One pseudo-cluster that changed as a block is added to
    them: deff = (K deff_hat + full) / (K + 1) with full = sum m_j^2 / n, the design effect when all items of a
    cluster move together. So without any change (K = 0) clusters are counted, not items, and the effective
    number of items has no jump when the first item changes. 1 when every cluster has one item.
    """
    if all(size == 1 for size in sizes):
        return 1.0
    full = sum(size * size for size in sizes) / sum(sizes)
    if informative == 0 or len(sizes) < 2 or variance <= 0:
        return full
    found = ratio_design_effect(sums, sizes, variance)
    return max(1.0, (informative * found + full) / (informative + 1))
