"""What the pages of evaluations show, as plain values: scores, groups, changed answers, cost, identity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meristem.evaluation.calibration import Calibration, calibration
from meristem.evaluation.comparison import Comparison, Group
from meristem.evaluation.contamination import ContaminationReport
from meristem.evaluation.cost import Cost, cost
from meristem.evaluation.exports.document import Measured, is_right
from meristem.evaluation.exports.finding import Finding
from meristem.evaluation.exports.scales import Scale, scale
from meristem.evaluation.results import ItemResult
from meristem.web import charts, wording
from meristem.web.items import Question, margin, prediction, question_of, questions

MOST_CHANGES = 200  # of each direction; the JSON export has all


@dataclass(frozen=True)
class Changed:
    """An item that changed sides, or, in units without sides, whose score moved."""

    name: str
    slice: str | None
    question: Question
    expected: str
    old: str
    new: str
    old_margin: float | None
    new_margin: float | None
    difference: float


@dataclass(frozen=True)
class Section:
    """The tasks or the slices."""

    name: str
    groups: tuple[Group, ...]

    @property
    def few(self) -> int:
        return sum(group.too_few for group in self.groups)


@dataclass(frozen=True)
class Side:
    """One version as it was measured."""

    found: Measured
    cost: Cost
    calibration: Calibration | None

    @property
    def label(self) -> str:
        return self.found.version.label

    @property
    def truncated(self) -> int:
        return int(self.found.entry.record.summary.get("truncated", 0))

    @property
    def bins(self) -> list[tuple[float, float, int]]:
        """Calibration bins with items in them: mean confidence, share right, items."""
        bins = self.calibration.bins if self.calibration else ()
        return [
            (b.confidence, b.accuracy, b.n)
            for b in bins
            if b.confidence is not None and b.accuracy is not None
        ]

    @property
    def measured(self) -> str:
        event = self.found.event
        return f"{wording.moment(event.time)} UTC by {event.actor}, {event.tool}" if event else "not recorded"


@dataclass(frozen=True)
class ComparisonView:
    old: Side
    new: Side
    comparison: Comparison
    finding: Finding
    scale: Scale
    margin: float | None
    sections: list[Section]
    worse: list[Changed]
    better: list[Changed]
    identity: list[tuple[str, str, str]]
    contamination: ContaminationReport | None

    @property
    def half(self) -> float:
        """Half the width of the axis that the bars of all tasks and slices share."""
        groups = [group for section in self.sections for group in section.groups]
        return charts.round_reach(v for g in groups for v in (g.difference, *(g.interval or ())))

    def tick(self, value: float) -> str:
        """A difference as an axis writes it: ``-10``, ``0``."""
        shown = self.scale.difference(value).removesuffix(".0")
        return "0" if shown.strip("+−0.") == "" else shown


def comparison_view(
    old: Measured,
    new: Measured,
    comparison: Comparison,
    found: Finding,
    margin: float | None = None,
    contamination: ContaminationReport | None = None,
) -> ComparisonView:
    """``contamination``: the report on the new version, when one was made."""
    worse, better = _changes(old, new, comparison)
    return ComparisonView(
        old=_side(old),
        new=_side(new),
        comparison=comparison,
        finding=found,
        scale=scale(comparison.unit),
        margin=margin,
        sections=_sections(comparison),
        worse=worse,
        better=better,
        identity=_identity(old, new),
        contamination=contamination,
    )


def _side(found: Measured) -> Side:
    return Side(found, cost(found.results, found.entry.seconds), calibration(found.results))


def _sections(comparison: Comparison) -> list[Section]:
    shown = [Section("task", comparison.tasks), Section("slice", comparison.slices)]
    return [section for section in shown if section.groups]


def _changes(old: Measured, new: Measured, comparison: Comparison) -> tuple[list[Changed], list[Changed]]:
    """Got worse, got better. The surest mistakes stand first where margins are known, else the greatest change."""
    asked = questions(new.suite)
    before, after = _by_name(old.results), _by_name(new.results)
    made = {name: _changed(name, asked, before[name], after[name]) for name in after}
    if comparison.unit is None:
        worse, better = [[made[name] for name in names] for names in (comparison.flipped, comparison.gained)]
    else:
        worse = [item for item in made.values() if item.difference < 0]
        better = [item for item in made.values() if item.difference > 0]

    def surest(item: Changed) -> tuple[float, float]:
        return (item.new_margin if item.new_margin is not None else 0.0, item.difference)

    def greatest(item: Changed) -> float:
        return -item.difference

    return sorted(worse, key=surest), sorted(better, key=greatest)


def _changed(name: str, asked: dict[str, Question], old: ItemResult, new: ItemResult) -> Changed:
    return Changed(
        name=name,
        slice=new["slice"],
        question=question_of(asked, new),
        expected=wording.clipped(new["answer"], 300),
        old=prediction(old),
        new=prediction(new),
        old_margin=margin(old),
        new_margin=margin(new),
        difference=new["score"] - old["score"],
    )


def _by_name(results: Iterable[ItemResult]) -> dict[str, ItemResult]:
    return {f"{row['task']}/{row['id']}": row for row in results}


def _identity(old: Measured, new: Measured) -> list[tuple[str, str, str]]:
    """Rows ``(name, old, new)``."""
    return [(name, a, b) for (name, a), (_, b) in zip(_digests(old), _digests(new), strict=True)]


def _digests(found: Measured) -> list[tuple[str, str]]:
    record = found.entry.record
    return [
        ("Version", found.version.digest),
        ("Content", found.version.content),
        ("Suite", record.suite),
        ("Engine", record.engine),
        ("Chat template", str(record.settings.get("template") or "none recorded")),
        ("Evaluation", found.entry.digest),
        ("Per-item results", record.results),
    ]


def engine_settings(found: Measured) -> list[tuple[str, str]]:
    """Everything that the engine digest covers, flat."""
    settings = found.entry.record.settings
    plain = [
        (key, value) for key, value in settings.items() if key not in ("libraries", "schema", "template")
    ]
    return [(key, str(value)) for key, value in (*plain, *settings.get("libraries", {}).items())]


@dataclass(frozen=True)
class Answered:
    name: str
    slice: str | None
    right: bool
    score: str
    question: Question
    expected: str
    given: str
    margin: float | None


@dataclass(frozen=True)
class EvaluationView:
    side: Side
    scale: Scale
    items: list[Answered]
    identity: list[tuple[str, str]]


def evaluation_view(found: Measured) -> EvaluationView:
    shown, asked = scale(found.results[0].get("unit")), questions(found.suite)
    items = [_answered(row, question_of(asked, row), shown) for row in found.results]
    return EvaluationView(_side(found), shown, sorted(items, key=lambda item: item.right), _digests(found))


def _answered(row: ItemResult, question: Question, shown: Scale) -> Answered:
    return Answered(
        name=f"{row['task']}/{row['id']}",
        slice=row["slice"],
        right=is_right(row),
        score=shown.score(row["score"]),
        question=question,
        expected=wording.clipped(row["answer"], 300),
        given=prediction(row),
        margin=margin(row),
    )
