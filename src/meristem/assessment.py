"""``Assessment``: the verbs that say what versions are worth: evaluations, comparisons, metrics, leaks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem.custody import Progress
from meristem.ecosystem import versions
from meristem.ecosystem.records import GateResult
from meristem.ecosystem.versions import VersionEntry
from meristem.registry import Registry

if TYPE_CHECKING:
    from meristem.evaluation.comparison import Comparison
    from meristem.evaluation.contamination import ContaminationReport
    from meristem.evaluation.matrix import LineMatrix
    from meristem.evaluation.results import ItemResult
    from meristem.evaluation.service import EvaluationEntry, Evaluator


class Assessment(Registry):
    """What versions are worth, measured with one engine's settings."""

    def __init__(self, root: Path, *, actor: str | None = None, progress: Progress | None = None):
        super().__init__(root, actor=actor, progress=progress)
        self._evaluator: Evaluator | None = None

    def evaluator(self) -> Evaluator:
        from meristem.evaluation.service import Evaluator

        if self._evaluator is None:
            self._evaluator = Evaluator(self.store, self.config.evaluation, self.actor, self.progress)
        return self._evaluator

    def evaluate(
        self, reference: str | VersionEntry, suite: str, *, expert: str | None = None
    ) -> EvaluationEntry:
        """Scores of a version on a suite: from the store if known, else measured and stored.

        ``expert``: of a version that keeps one expert per task, the task whose expert answers everything.
        """
        return self.evaluator().evaluate(self.version(reference), self.asset("suite", suite), expert)

    def evaluations(self) -> list[EvaluationEntry]:
        """Every evaluation in the store; nothing is computed."""
        from meristem.evaluation.service import stored_evaluations

        return stored_evaluations(self.store)

    def results(self, evaluation: EvaluationEntry) -> list[ItemResult]:
        return self.evaluator().results(evaluation)

    def compare(self, new: str | VersionEntry, old: str | VersionEntry, *, suite: str) -> Comparison:
        """Paired comparison of two versions, item by item; differences are new - old."""
        before, after = self.evaluate(old, suite), self.evaluate(new, suite)
        return self.evaluator().compare(before, after)

    def task_matrix(self, reference: str | VersionEntry) -> LineMatrix:
        """A[t, i] over the line of versions behind ``reference``, with ACC, BWT, FWT and forgetting."""
        from meristem.evaluation.matrix import line_matrix

        version = self.version(reference)
        with self.store.database.read() as connection:
            line = [v for v in versions.ancestors(connection, version) if v.model == version.model]
        return line_matrix(self.evaluator().task_score, line[::-1], self.suites())

    def contamination(
        self, reference: str | VersionEntry, suite: str, *, ngram: int = 13
    ) -> ContaminationReport:
        """The items of ``suite`` that stand in what a version and all that it grew from learned."""
        from meristem.evaluation.contamination import ancestry_overlap

        version, asset = self.version(reference), self.asset("suite", suite)
        return ancestry_overlap(self.store, version, asset, ngram, self.progress)

    def judge(
        self, new: str | VersionEntry, old: str | VersionEntry, *, suite: str, gate: str, **arguments: Any
    ) -> GateResult:
        """What a gate would say about two versions; nothing is recorded. For trying out a policy."""
        from meristem.release import gates
        from meristem.release.cases import GateCase, Measured

        asset = self.asset("suite", suite)
        case = GateCase(self.version(new), self.version(old), asset, Measured(self.evaluator()))
        return gates.judge(gate, arguments, case)
