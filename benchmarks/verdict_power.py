"""How often each verdict is given: simulated comparisons against exact sums, and coverage under clusters.

python -m benchmarks.verdict_power --out benchmarks/results/verdict-power.json     (1 to 2 minutes, 1 thread)

Every simulated comparison is judged by the verdict that a gate asks. Binary results enter through their counts
alone, so equal counts are judged once.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tests.evaluation.paired import quick_counts, results

from meristem.evaluation.comparison import compare
from meristem.evaluation.intervals import bootstrap_interval, tango_interval
from meristem.evaluation.power import Question, binary_chances, chances
from meristem.evaluation.sample import Sample
from meristem.evaluation.significance import mcnemar_p
from meristem.evaluation.verdicts import Verdict, improvement, negative_flips, non_inferiority

MARGIN = 0.02
KINDS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # flipped, gained, the same


@cache
def judged(flipped: int, gained: int, n: int, gate: str, number: float) -> Verdict:
    gates = {
        "non_inferiority": non_inferiority,
        "improvement": improvement,
        "negative_flips": negative_flips,
    }
    return gates[gate](quick_counts(flipped, gained, n), number)


def drawn(rng: Any, n: int, b: float, c: float, times: int) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for x, y, _ in rng.multinomial(n, [b, c, 1 - b - c], size=times)]


def headline() -> dict[str, Any]:
    """1,000 items, 5 % discordant, 3 points lost: how many of 100 comparisons are *fail*, 100 times over."""
    b, c, n = 0.04, 0.01, 1000
    found = [
        judged(*k, n, "non_inferiority", MARGIN).outcome
        for k in drawn(np.random.default_rng(0), n, b, c, 10_000)
    ]
    hundreds = np.reshape([outcome == "fail" for outcome in found], (100, 100)).sum(axis=1)
    return {
        "items": n,
        "flipped": b,
        "gained": c,
        "margin": MARGIN,
        "failed": float(np.mean(hundreds)) / 100,
        "fewest_of_100": int(hundreds.min()),
        "exact": binary_chances(b, c, n, Question(-MARGIN, 0.0)).failed,
    }


def grid(times: int) -> list[dict[str, Any]]:
    """Pass and fail rates at several n, discordance p and effect d, against the exact sum."""
    rng, found = np.random.default_rng(1), []
    for n in (100, 300, 1000):
        for p in (0.02, 0.05, 0.2):
            for d in (0.0, -0.01, -0.03, 0.02):
                if abs(d) > p:
                    continue
                b, c = (p - d) / 2, (p + d) / 2
                outcomes = [
                    judged(*k, n, "non_inferiority", MARGIN).outcome for k in drawn(rng, n, b, c, times)
                ]
                exact = binary_chances(b, c, n, Question(-MARGIN, 0.0))
                line = {"n": n, "discordance": p, "difference": d}
                line |= {"passed": outcomes.count("pass") / times, "exact_passed": exact.passed}
                line |= {"failed": outcomes.count("fail") / times, "exact_failed": exact.failed}
                found.append(line)
    return found


def null() -> list[dict[str, Any]]:
    """Equally good models with symmetric flips: share of *fail* among 2,000, at the strictest margin, 0."""
    rng, found = np.random.default_rng(2), []
    for n, p in (
        (50, 0.2),
        (100, 0.1),
        (200, 0.05),
        (200, 0.2),
        (500, 0.05),
        (1000, 0.01),
        (1000, 0.05),
        (1000, 0.2),
    ):
        outcomes = [judged(*k, n, "non_inferiority", 0.0).outcome for k in drawn(rng, n, p / 2, p / 2, 2000)]
        exact = binary_chances(p / 2, p / 2, n, Question(0.0, 0.0)).failed
        found.append({"n": n, "discordance": p, "failed": outcomes.count("fail") / 2000, "exact": exact})
    return found


def asked_binary(times: int) -> list[dict[str, Any]]:
    """Too few items: the number asked for, and the share settled when that many are simulated."""
    rng, found = np.random.default_rng(3), []
    cases = [
        ("non_inferiority", 0.02, (2, 2, 100)),
        ("non_inferiority", 0.02, (6, 5, 200)),
        ("non_inferiority", 0.02, (3, 1, 100)),
        ("non_inferiority", 0.05, (2, 0, 40)),
        ("non_inferiority", 0.02, (0, 0, 30)),
        ("non_inferiority", 0.02, (15, 16, 300)),
        ("improvement", 0.0, (3, 6, 100)),
        ("improvement", 0.05, (2, 4, 60)),
        ("negative_flips", 0.1, (3, 0, 40)),
        ("negative_flips", 0.05, (4, 2, 60)),
    ]
    for gate, number, (flipped, gained, n) in cases:
        verdict = judged(flipped, gained, n, gate, number)
        needed = verdict.needed
        assert verdict.outcome == "inconclusive" and needed is not None, (gate, number, flipped, gained, n)
        later = [
            judged(*k, needed, gate, number).outcome != "inconclusive"
            for k in drawn(rng, needed, flipped / n, gained / n, times)
        ]
        found.append(
            {"gate": gate, "number": number, "flipped": flipped, "gained": gained, "n": n, "needed": needed}
            | {"settled": float(np.mean(later))}
        )
    return found


def asked_graded(times: int) -> list[dict[str, Any]]:
    """As ``asked_binary``, for graded shares: resamples of the observed pairs at the number asked for."""
    found = []
    for seed, spread, loss, n in ((0, 0.15, 0.0, 60), (1, 0.3, 0.01, 100), (2, 0.05, 0.03, 30)):
        rng = np.random.default_rng(seed)
        old = rng.beta(4, 2, n)
        new = np.clip(old - loss + rng.normal(0, spread, n), 0, 1)
        verdict = non_inferiority(compare(old=results(old), new=results(new)), MARGIN)
        if verdict.needed is None:
            continue
        settled = 0
        for _ in range(times):
            took = rng.integers(0, n, verdict.needed)
            again = compare(old=results(old[took]), new=results(new[took]))
            settled += non_inferiority(again, MARGIN).outcome != "inconclusive"
        found.append({"n": n, "needed": verdict.needed, "settled": settled / times})
    return found


def clustered_pairs(
    rng: Any, clusters: int, size: int, b: float, c: float, rho: float
) -> tuple[list[Any], list[int]]:
    """Items copy their cluster's draw with probability sqrt(rho): the correlation of two of them is rho."""
    p = [b, c, 1 - b - c]
    common = rng.choice(3, p=p, size=(clusters, 1))
    own = rng.choice(3, p=p, size=(clusters, size))
    kinds = np.where(rng.random((clusters, size)) < math.sqrt(rho), common, own)
    return [KINDS[k] for k in kinds.ravel()], [j for j in range(clusters) for _ in range(size)]


def coverage(times: int) -> list[dict[str, Any]]:
    """Two-sided 90 % intervals of clustered binary differences, aware of the clusters and not; false alarms of
    the two tests at 5 % where nothing changed on average."""
    rng, found = np.random.default_rng(4), []
    for clusters, size, b, c, rho in (
        (200, 5, 0.05, 0.05, 0.0),
        (200, 5, 0.05, 0.05, 0.5),
        (200, 5, 0.03, 0.03, 1.0),
        (200, 5, 0.01, 0.01, 0.5),
        (100, 10, 0.1, 0.05, 0.3),
        (40, 10, 0.1, 0.05, 0.5),
        (20, 10, 0.05, 0.05, 0.5),
        (10, 20, 0.1, 0.1, 0.3),
    ):
        ours = naive = flips = alarms = naive_alarms = 0
        for _ in range(times):
            sample = Sample.of(*clustered_pairs(rng, clusters, size, b, c, rho))
            low, high = sample.interval(0.9, 0)
            ours += low <= c - b <= high
            low, high = tango_interval(sample.flipped, sample.gained, sample.n, 0.9)
            naive += low <= c - b <= high
            low, high = sample.flip_interval(0.9)
            flips += low <= b <= high
            alarms += sample.p_value(0) < 0.05
            naive_alarms += mcnemar_p(sample.flipped, sample.gained) < 0.05
        line = {"clusters": clusters, "size": size, "flipped": b, "gained": c, "correlation": rho}
        line |= {"covered": ours / times, "covered_naive": naive / times, "covered_flips": flips / times}
        if b == c:
            line |= {"alarms": alarms / times, "alarms_mcnemar": naive_alarms / times}
        found.append(line)
    return found


def graded_coverage(times: int) -> list[dict[str, Any]]:
    """Two-sided 90 % intervals of graded differences, ours and the plain BCa."""
    rng, found = np.random.default_rng(5), []
    for n in (5, 10, 20, 50):
        for name, draw, truth, share in (
            ("share, sd 0.2", lambda n: (rng.beta(2, 2, n), rng.beta(2, 2, n)), 0.0, True),
            (
                "share, rare change",
                lambda n: (np.ones(n), 1 - (rng.random(n) < 0.05) * rng.random(n)),
                -0.025,
                True,
            ),
            ("nats, normal", lambda n: (np.zeros(n), rng.normal(0, 1, n)), 0.0, False),
            ("nats, skewed", lambda n: (np.zeros(n), 1 - rng.exponential(1, n)), 0.0, False),
        ):
            ours = plain = 0
            for _ in range(times):
                old, new = draw(n)
                sample = Sample.of(list(zip(old, new, strict=True)), None, False, share)
                low, high = sample.interval(0.9, 0)
                ours += low <= truth <= high
                low, high = bootstrap_interval(list(new - old), 0.9, 0)
                plain += low <= truth <= high
            found.append(
                {"n": n, "differences": name, "covered": ours / times, "covered_plain_bca": plain / times}
            )
    return found


def asked_clustered(times: int) -> dict[str, Any]:
    """The number asked for where five items share a source."""
    rng = np.random.default_rng(6)
    b = c = 0.03
    while True:
        pairs, sources = clustered_pairs(rng, 60, 5, b, c, 0.5)
        first = Sample.of(pairs, sources)
        if (first.flipped, first.gained) == (9, 9) and 2.2 < first.design_effect < 3.2:
            break  # a sample that shows the truth, for the promise is about "what was observed"
    verdict = non_inferiority(
        compare(
            old=results([p[0] for p in pairs], clusters=sources),
            new=results([p[1] for p in pairs], clusters=sources),
        ),
        MARGIN,
    )
    assert verdict.needed is not None
    settled = 0
    for _ in range(times):
        pairs, sources = clustered_pairs(rng, round(verdict.needed / 5), 5, b, c, 0.5)
        low, high = Sample.of(pairs, sources).interval(0.9, 0)
        settled += low > -MARGIN or high < 0
    foreseen = chances(first, Question(-MARGIN, 0.0), verdict.needed).settled
    return {"n": 300, "needed": verdict.needed, "design_effect": first.design_effect} | {
        "foreseen": foreseen,
        "settled": settled / times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--times", type=int, default=1000)
    options = parser.parse_args()
    cells = grid(8 * options.times)
    gaps = [abs(c[f"{k}ed"] - c[f"exact_{k}ed"]) for c in cells for k in ("pass", "fail")]
    document: dict[str, Any] = {
        "headline": headline(),
        "grid": cells,
        "grid_largest_gap": max(gaps),
        "symmetric_flips": null(),
        "number_asked_for": asked_binary(options.times),
        "number_asked_for_graded": asked_graded(options.times // 10),
        "number_asked_for_clustered": asked_clustered(options.times // 2),
        "cluster_coverage": coverage(options.times // 2),
        "graded_coverage": graded_coverage(options.times // 2),
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({k: v for k, v in document.items() if k != "grid"}, indent=1))


if __name__ == "__main__":
    main()
