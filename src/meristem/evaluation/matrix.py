"""The task matrix of a line of versions: what each version scores on each task, in the order learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.evaluation.metrics import TaskMatrix

Score = Callable[[VersionEntry, AssetEntry, str], float | None]


@dataclass(frozen=True)
class LineMatrix:
    """``matrix.scores[t][i]``: version ``versions[t]``, which learned ``tasks[t]``, on ``tasks[i]``.

    The last row is always the line's last version, whatever it learned.
    """

    versions: tuple[str, ...]
    tasks: tuple[str, ...]
    matrix: TaskMatrix

    def to_document(self) -> dict[str, Any]:
        return {"versions": list(self.versions), "tasks": list(self.tasks), **self.matrix.to_document()}


def line_matrix(score: Score, line: list[VersionEntry], suites: list[AssetEntry]) -> LineMatrix:
    """The matrix of ``line`` (oldest first; its first version gives the baseline).

    ``score(version, suite, task)`` gives one cell, or None where nothing was measured. A task counts when some
    suite tests it. Raises ``BadInput`` when the line learned no such task.
    """
    tested = {task: suite for suite in suites for task in suite.record.facts["tasks"]}
    steps, known = [], set(line[0].record.tasks)
    for version in line[1:]:
        fresh = [task for task in version.record.tasks if task not in known]
        known |= set(fresh)
        steps += [(version, task) for task in fresh if task in tested]
    if not steps:
        raise BadInput(f"{line[-1].label} and its ancestors learned no task that a suite tests")
    steps[-1] = (line[-1], steps[-1][1])  # later versions may have retrained known tasks only
    tasks = [task for _, task in steps]
    rows = [tuple(score(version, tested[task], task) for task in tasks) for version, _ in steps]
    baseline = tuple(score(line[0], tested[task], task) for task in tasks)
    return LineMatrix(tuple(v.label for v, _ in steps), tuple(tasks), TaskMatrix(tuple(rows), baseline))
