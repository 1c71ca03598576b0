"""The task matrix of a line of versions: what each version scores on each task, in the order learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.evaluation.metrics import TaskMatrix, mean_delta

Score = Callable[[VersionEntry, AssetEntry, str], float | None]
STAGES = {"general": "gad", "instruction": "ifd", "safety": "sd"}


@dataclass(frozen=True)
class SuiteDelta:
    """One suite of a kind that every update must keep: R[0] and R[t], the line's first and last version."""

    suite: str
    kind: str
    first: float | None
    last: float | None


@dataclass(frozen=True)
class LineMatrix:
    """``matrix.scores[t][i]``: version ``versions[t]``, which learned ``tasks[t]``, on ``tasks[i]``.

    The last row is always the line's last version, whatever it learned. ``deltas``: the scores behind
    GAD, IFD and SD.
    """

    versions: tuple[str, ...]
    tasks: tuple[str, ...]
    matrix: TaskMatrix
    deltas: tuple[SuiteDelta, ...] = ()

    @property
    def gad(self) -> float | None:
        """General ability delta: mean over general suites of (R[t] - R[0])."""
        return self._delta("general")

    @property
    def ifd(self) -> float | None:
        """Instruction following delta."""
        return self._delta("instruction")

    @property
    def sd(self) -> float | None:
        """Safety delta."""
        return self._delta("safety")

    def _delta(self, kind: str) -> float | None:
        found = [delta for delta in self.deltas if delta.kind == kind]
        return mean_delta([delta.first for delta in found], [delta.last for delta in found])

    def to_document(self) -> dict[str, Any]:
        return {
            "versions": list(self.versions),
            "tasks": list(self.tasks),
            **self.matrix.to_document(),
            "gad": self.gad,
            "ifd": self.ifd,
            "sd": self.sd,
            "deltas": [vars(delta) for delta in self.deltas],
        }


def line_matrix(
    score: Score, line: list[VersionEntry], suites: list[AssetEntry], deltas: bool = True
) -> LineMatrix:
    """The matrix of ``line`` (oldest first; its first version gives the baseline).

    ``score(version, suite, task)`` gives one cell, or None where nothing was measured. A task counts when some
    suite tests it; beside tasks scored in shares, those in another unit are left out, as they have no mean with
    them. Raises ``BadInput`` when the line learned no such task. ``deltas=False`` asks for no score of
    the general, instruction and safety suites.
    """
    tested = {task: suite for suite in suites for task in suite.record.facts["tasks"]}
    steps, known = [], set(line[0].record.tasks)
    for version in line[1:]:
        fresh = [task for task in version.record.tasks if task not in known]
        known |= set(fresh)
        steps += [(version, task) for task in fresh if task in tested]
    steps = _of_one_unit(steps, tested)
    if not steps:
        raise BadInput(f"{line[-1].label} and its ancestors learned no task that a suite tests")
    steps[-1] = (line[-1], steps[-1][1])  # later versions may have retrained known tasks only
    tasks = [task for _, task in steps]
    rows = [tuple(score(version, tested[task], task) for task in tasks) for version, _ in steps]
    baseline = tuple(score(line[0], tested[task], task) for task in tasks)
    return LineMatrix(
        tuple(v.label for v, _ in steps),
        tuple(tasks),
        TaskMatrix(tuple(rows), baseline),
        suite_deltas(score, line[0], line[-1], suites) if deltas else (),
    )


def _of_one_unit(
    steps: list[tuple[VersionEntry, str]], tested: dict[str, AssetEntry]
) -> list[tuple[VersionEntry, str]]:
    """Of tasks in several units those in shares, or else in the unit of the first."""
    units = [tested[task].record.facts.get("unit") for _, task in steps]
    kept = None if None in units else units[0] if units else None
    return [step for step, unit in zip(steps, units, strict=True) if unit == kept]


def suite_deltas(
    score: Score, first: VersionEntry, last: VersionEntry, suites: list[AssetEntry]
) -> tuple[SuiteDelta, ...]:
    """R[0] and R[t] of every suite of one kind alone among general, instruction and safety, in its newest version.

    Left out: a suite that mixes kinds, whose score would count a target task as general ability, and one scored in
    another unit than shares, which has no mean with the others.
    """
    newest = {suite.name: suite for suite in suites}
    return tuple(
        SuiteDelta(name, kind, _suite_score(score, first, suite), _suite_score(score, last, suite))
        for name, suite in newest.items()
        if "unit" not in suite.record.facts
        for kind in suite.record.facts.get("kinds", [])
        if kind in STAGES and len(suite.record.facts["kinds"]) == 1
    )


def _suite_score(score: Score, version: VersionEntry, suite: AssetEntry) -> float | None:
    """Mean over the suite's tasks, each counted once, as in the papers' averages over benchmarks."""
    found = [score(version, suite, task) for task in suite.record.facts["tasks"]]
    known = [value for value in found if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(found) else None
