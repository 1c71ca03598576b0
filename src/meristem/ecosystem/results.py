"""What the public API hands back about updates and decisions: the record with what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import Decision, GateResult, Update, UpdateOutcome
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput


@dataclass(frozen=True)
class UpdateResult:
    """An update with the version that it produced (``None`` until it is done)."""

    entry: Entry
    record: Update
    parent: VersionEntry
    made: VersionEntry | None
    outcome: UpdateOutcome | None

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def version(self) -> VersionEntry:
        if self.made is None:
            raise BadInput(f"{self.id} is {self.entry.status} and has no version yet; resume it")
        return self.made


@dataclass(frozen=True)
class DecisionResult:
    """A decision as ``propose`` and ``explain`` give it."""

    entry: Entry
    record: Decision
    approvals: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def passed(self) -> bool:
        return self.record.outcome == "pass"

    @property
    def outcome(self) -> str:
        return self.record.outcome

    @property
    def gates(self) -> list[GateResult]:
        return self.record.gates

    @property
    def approvals_missing(self) -> int:
        return max(0, self.record.approvals_needed - len(self.approvals))
