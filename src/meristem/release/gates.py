"""Gates: one release criterion each, judged on the evidence about champion and candidate.

A gate is a subclass of ``Gate``, registered by name through the entry-point group ``meristem.gates``; its fields are
its arguments.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import GateResult
from meristem.errors import BadInput
from meristem.release.cases import GateCase

if TYPE_CHECKING:
    from meristem.evaluation.comparison import Comparison
    from meristem.evaluation.contamination import ContaminationReport
    from meristem.evaluation.verdicts import Verdict

GROUP = "meristem.gates"
SHARE = "share"
_SHOWN = 5


class Gate(BaseModel):
    """A criterion with its numbers. ``judge`` answers pass, fail or inconclusive, with the reason.

    ``compares``: it asks for ``case.comparison``, so both versions are evaluated on its suites beforehand. Where no
    gate compares, nothing says how good a version is, and no decision is made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    compares: ClassVar[bool] = True

    def fits(self, suite: AssetEntry) -> bool:
        """Whether the scores of ``suite`` are of a kind that this gate judges; those that are not it passes over, unless
        it names them."""
        return True

    def check(self, suite: AssetEntry) -> None:
        """Raises ``BadInput`` for a suite that this gate cannot judge; asked before anything is trained."""

    def judge(self, case: GateCase) -> Verdict:
        raise NotImplementedError


class Paired(Gate):
    """A gate on the paired comparison; its bounds are one-sided at ``confidence``.

    ``slice``: only the items of this slice count, one that must not get worse whatever the others do.
    """

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    slice: str | None = Field(default=None, min_length=1)

    def check(self, suite: AssetEntry) -> None:
        known = suite.record.facts.get("slices")
        if self.slice is not None and known is not None and self.slice not in known:
            raise BadInput(
                f"a gate asks about slice {self.slice!r} of suite {suite.name}, whose slices are "
                f"{', '.join(known)}; correct it in meristem.yaml, or name the gate's suites"
            )

    def judge(self, case: GateCase) -> Verdict:
        return self.verdict(case.compared(self.slice))

    def verdict(self, comparison: Comparison) -> Verdict:
        raise NotImplementedError


class NonInferiority(Paired):
    """No worse than the champion by ``margin`` or more, in the unit of the scores (of shares, 0.05 = 5 points)."""

    margin: float = Field(ge=0, allow_inf_nan=False)

    def check(self, suite: AssetEntry) -> None:
        super().check(suite)
        _refuse_more_than_all("non_inferiority: margin", self.margin, suite)

    def verdict(self, comparison: Comparison) -> Verdict:
        from meristem.evaluation.verdicts import non_inferiority

        return non_inferiority(comparison, margin=self.margin, confidence=self.confidence)


class Improvement(Paired):
    """Better than the champion by more than ``min_gain``, in the unit of the scores."""

    min_gain: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def check(self, suite: AssetEntry) -> None:
        super().check(suite)
        _refuse_more_than_all("improvement: min_gain", self.min_gain, suite)

    def verdict(self, comparison: Comparison) -> Verdict:
        from meristem.evaluation.verdicts import improvement

        return improvement(comparison, min_gain=self.min_gain, confidence=self.confidence)


class NegativeFlips(Paired):
    """At most ``max_rate`` of the items that the champion answers right and the candidate wrong.

    Only where scores are shares: an item with so many bits per byte is neither right nor wrong.
    """

    max_rate: float = Field(ge=0, le=1)

    def check(self, suite: AssetEntry) -> None:
        super().check(suite)
        _refuse_unit(suite, suite.record.facts.get("unit"))

    def fits(self, suite: AssetEntry) -> bool:
        return suite.record.facts.get("unit") in (None, SHARE)

    def judge(self, case: GateCase) -> Verdict:
        _refuse_unit(case.suite, case.comparison.unit)
        return super().judge(case)

    def verdict(self, comparison: Comparison) -> Verdict:
        from meristem.evaluation.verdicts import negative_flips

        return negative_flips(comparison, max_rate=self.max_rate, confidence=self.confidence)


def _refuse_more_than_all(what: str, value: float, suite: AssetEntry) -> None:
    if value > 1 and suite.record.facts.get("unit") in (None, SHARE):
        raise BadInput(
            f"gate {what}: {value:g} is more than the scores of suite {suite.name} can differ; they are shares, and "
            "0.05 is five points"
        )


def _refuse_unit(suite: AssetEntry, unit: str | None) -> None:
    if unit not in (None, SHARE):
        raise BadInput(
            f"gate negative_flips cannot judge suite {suite.name}: its scores are {unit.replace('_', ' ')}, and only "
            "shares are right or wrong; name the suites of this gate in meristem.yaml"
        )


class Contamination(Gate):
    """At most ``max_items`` items (or ``max_share`` of them) stand in training data of the candidate's ancestry.

    An item counts when its whole input stands there, or more than ``min_share`` of its n-grams of ``ngram`` words.
    Inconclusive where training data was deleted or retired since; a policy that has ``unchecked: accept`` lives with it.
    """

    compares: ClassVar[bool] = False
    max_items: int | None = Field(default=None, ge=0)
    max_share: float | None = Field(default=None, ge=0, le=1)
    ngram: int = Field(default=13, ge=3, le=100)
    min_share: float = Field(default=0.0, ge=0, lt=1)
    unchecked: Literal["inconclusive", "accept"] = "inconclusive"

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_items is not None and self.max_share is not None:
            raise ValueError("give max_items or max_share, not both")
        return self

    def judge(self, case: GateCase) -> Verdict:
        from meristem.evaluation.verdicts import Verdict

        report = case.contamination(self.ngram)
        counted = [match for match in report.found if match.share > self.min_share]
        answered = sum(bool(match.answer) for match in counted)
        limit = self.max_items or 0 if self.max_share is None else self.max_share * report.items
        numbers: dict[str, Any] = {
            "n": report.items,
            "contaminated": len(counted),
            "exact": sum(match.kind == "exact" for match in counted),
            "with_answer": answered,
            "searched": report.searched,
            "rows": report.rows,
            "unchecked_data": len(report.unchecked),
        }
        told = f"{len(counted)} of {report.items} items stand in the training data (limit {limit:g})"
        if counted:
            ids = [match.item for match in counted]
            numbers["first"] = ids[:_SHOWN]
            more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
            told += f", {answered} of them with their answer: {', '.join(ids[:_SHOWN])}{more}"
        told = f"{told}; {_extent(report)}"
        if len(counted) > limit:
            return Verdict("fail", told, numbers)
        if not report.complete and self.unchecked == "inconclusive":
            return Verdict("inconclusive", told, numbers)
        return Verdict("pass", told, numbers)


def _extent(report: ContaminationReport) -> str:
    """How far the search went, and what it could not see."""
    told = [f"{report.rows} rows of {len(report.checked)} data sets read for {report.ngram} words in a row"]
    if report.unchecked:
        gone = ", ".join(f"{data.label} ({data.why})" for data in report.unchecked)
        told.append(f"not checked, because its rows are gone: {gone}")
    if report.blank:
        told.append(f"{report.blank} items hold no text to look for")
    if report.unrecorded:
        told.append(f"what {', '.join(report.unrecorded)} learned from is not recorded")
    return "; ".join(told)


def build(name: str, arguments: dict[str, Any]) -> Gate:
    """The gate called ``name``. Raises ``BadInput`` for an unknown gate or argument."""
    try:
        return _type(name)(**arguments)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise BadInput(f"gate {name}: {where}: {detail['msg'].lower()}") from error


def regressed(result: GateResult) -> bool:
    """Whether a gate found the candidate worse than the champion, which another training may mend."""
    return result.outcome == "fail" and _type(result.gate).compares


def _type(name: str) -> type[Gate]:
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in known:
        raise BadInput(f"unknown gate '{name}'; gates here: {', '.join(sorted(known))}")
    found = known[name].load()
    assert issubclass(found, Gate)
    return found


def judge(name: str, arguments: dict[str, Any], case: GateCase) -> GateResult:
    """What the gate ``name`` says about ``case``."""
    gate = build(name, arguments)
    gate.check(case.suite)
    verdict = gate.judge(case)
    return GateResult(
        gate=name,
        suite=case.suite.name,
        outcome=verdict.outcome,
        reason=verdict.reason,
        numbers={**arguments, **verdict.numbers},
        needed=verdict.needed,
    )
