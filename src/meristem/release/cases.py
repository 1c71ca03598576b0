"""What a gate is given: two versions, a suite, and the evidence about them, gathered when a gate first asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.versions import VersionEntry

if TYPE_CHECKING:
    from meristem.evaluation.comparison import Comparison
    from meristem.evaluation.contamination import ContaminationReport
    from meristem.evaluation.service import EvaluationEntry, Evaluator


class Evidence(Protocol):
    """Where a case has its evidence from. The same question again costs nothing."""

    def comparison(self, case: GateCase, slice_: str | None) -> Comparison:
        """Champion and candidate on the suite, item by item; ``slice_``: on the items of this slice alone."""
        ...

    def contamination(self, case: GateCase, ngram: int) -> ContaminationReport:
        """The suite in the training data of the candidate."""
        ...


@dataclass(frozen=True)
class GateCase:
    """One question to a gate: may ``candidate`` replace ``champion``, as far as ``suite`` tells?"""

    candidate: VersionEntry
    champion: VersionEntry
    suite: AssetEntry
    evidence: Evidence

    @cached_property
    def comparison(self) -> Comparison:
        """Paired, new - old. Measured now where it was not before (a gate with ``compares`` finds it ready)."""
        return self.compared(None)

    def compared(self, slice_: str | None) -> Comparison:
        """The paired comparison on one slice, or on all items. Raises ``BadInput`` for a slice that has none."""
        return self.evidence.comparison(self, slice_)

    def contamination(self, ngram: int = 13) -> ContaminationReport:
        """Items of the suite that stand in training data of the candidate or of anything that it grew from."""
        return self.evidence.contamination(self, ngram)


class Measured:
    """Evidence from a workspace. ``used``: digests of the evaluations that some comparison was made of.

    ``searched``: the suites whose contamination will be asked for; they are looked at in one reading of the data.
    """

    def __init__(self, evaluator: Evaluator, searched: Iterable[AssetEntry] = ()):
        self.evaluator = evaluator
        self.used: list[str] = []
        self._searched = list(searched)
        self._evaluations: dict[tuple[str, str], EvaluationEntry] = {}
        self._compared: dict[tuple[str, str, str | None], Comparison] = {}
        self._reports: dict[tuple[str, str, int], ContaminationReport] = {}

    def evaluate(self, version: VersionEntry, suite: AssetEntry) -> EvaluationEntry:
        key = version.digest, suite.digest
        if key not in self._evaluations:
            self._evaluations[key] = self.evaluator.evaluate(version, suite)
        return self._evaluations[key]

    def comparison(self, case: GateCase, slice_: str | None = None) -> Comparison:
        old, new = self.evaluate(case.champion, case.suite), self.evaluate(case.candidate, case.suite)
        self.used = list(dict.fromkeys([*self.used, old.digest, new.digest]))
        key = old.digest, new.digest, slice_
        if key not in self._compared:  # several gates ask the same
            self._compared[key] = self.evaluator.compare(old, new, slice_=slice_)
        return self._compared[key]

    def contamination(self, case: GateCase, ngram: int) -> ContaminationReport:
        from meristem.evaluation.contamination import ancestry_overlaps

        key = case.candidate.digest, case.suite.digest, ngram
        if key not in self._reports:
            suites = {entry.digest: entry for entry in [*self._searched, case.suite]}
            found = ancestry_overlaps(
                self.evaluator.store, case.candidate, list(suites.values()), ngram, self.evaluator.progress
            )
            for digest, report in zip(suites, found, strict=True):
                self._reports[case.candidate.digest, digest, ngram] = report
        return self._reports[key]
