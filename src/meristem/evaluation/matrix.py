"""The task matrix of a line of versions: what each version scores on each task, in the order learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.evaluation.metrics import TaskMatrix
from meristem.evaluation.service import Evaluator


@dataclass(frozen=True)
class LineMatrix:
    """``matrix.scores[t][i]``: version ``versions[t]``, which learned ``tasks[t]``, on ``tasks[i]``."""

    versions: tuple[str, ...]
    tasks: tuple[str, ...]
    matrix: TaskMatrix

    def to_document(self) -> dict[str, Any]:
        return {"versions": list(self.versions), "tasks": list(self.tasks), **self.matrix.to_document()}


def line_matrix(evaluator: Evaluator, line: list[VersionEntry], suites: list[AssetEntry]) -> LineMatrix:
    """The matrix of ``line`` (oldest first; its first version gives the baseline). Missing cells are measured.

    A task counts when some suite tests it. Raises ``BadInput`` when the line learned no such task.
    """
    tested = {task: suite for suite in suites for task in suite.record.facts["tasks"]}
    steps, known = [], set(line[0].record.tasks)
    for version in line[1:]:
        fresh = [task for task in version.record.tasks if task not in known]
        known |= set(fresh)
        steps += [(version, task) for task in fresh if task in tested]
    if not steps:
        raise BadInput(f"{line[-1].label} and its ancestors learned no task that a suite tests")
    tasks = [task for _, task in steps]
    rows = [_scores(evaluator, version, tasks, tested) for version, _ in steps]
    baseline = _scores(evaluator, line[0], tasks, tested)
    return LineMatrix(tuple(v.label for v, _ in steps), tuple(tasks), TaskMatrix(rows, baseline))


def _scores(
    evaluator: Evaluator, version: VersionEntry, tasks: list[str], tested: dict[str, AssetEntry]
) -> tuple[float, ...]:
    return tuple(evaluator.evaluate(version, tested[task]).record.summary["tasks"][task] for task in tasks)
