"""The heat map of stored scores and the continual-learning metrics that those scores allow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.evaluation.exports.scales import scale
from meristem.evaluation.matrix import line_matrix
from meristem.evaluation.service import EvaluationEntry
from meristem.web import wording
from meristem.web.report_data import Snapshot, Standing, standing


@dataclass(frozen=True)
class Column:
    """One task of one suite."""

    suite: AssetEntry
    task: str

    @property
    def detail(self) -> str:
        kinds = " and ".join(self.suite.record.facts["kinds"])
        unit = self.suite.record.facts.get("unit")
        counted = wording.plural(self.suite.record.facts["items"], "item")
        return f"{kinds} · {counted}" + (f" · {scale(unit).words}" if unit else "")


@dataclass(frozen=True)
class Cell:
    score: float | None
    other_settings: bool = False  # measured, but not with the settings of the newest evaluation of the suite
    unit: str | None = None

    @property
    def shown(self) -> str:
        return "" if self.score is None else scale(self.unit).score(self.score).removesuffix(" %")

    @property
    def style(self) -> str:
        """A single-hue scale from pale to deep blue; the text colour keeps a contrast of 4.5 to 1."""
        if self.score is None or self.unit is not None:
            return ""
        share = min(1.0, max(0.0, self.score))
        pale, deep = (240, 245, 250), (18, 74, 124)
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(pale, deep, strict=True))
        return f"background:rgb({red},{green},{blue});color:{'#fff' if share >= 0.72 else '#000'}"


@dataclass(frozen=True)
class HeatRow:
    version: VersionEntry
    standing: Standing
    cells: list[Cell]


@dataclass(frozen=True)
class Metric:
    name: str
    meaning: str
    value: str  # empty when it cannot be told
    why_not: str


@dataclass(frozen=True)
class Scores:
    columns: list[Column]
    rows: list[HeatRow]
    missing: int
    other_settings: int
    metrics: list[Metric]
    metrics_note: str


class Stored:
    """Stored evaluations by content and suite. ``engine`` of a suite: that of its newest evaluation."""

    def __init__(self, evaluations: Iterable[EvaluationEntry]):
        self.engine: dict[str, str] = {}
        self._found: dict[tuple[str, str], list[EvaluationEntry]] = {}
        for entry in evaluations:  # oldest first
            self.engine[entry.record.suite] = entry.record.engine
            self._found.setdefault((entry.record.content, entry.record.suite), []).append(entry)

    def newest(self, version: VersionEntry, suite: AssetEntry) -> tuple[EvaluationEntry | None, bool]:
        """The evaluation to show, and whether it was made with other settings than the suite's newest."""
        digest = suite.record.facts["digest"]
        found = self._found.get((version.content, digest), [])
        same = [entry for entry in found if entry.record.engine == self.engine[digest]]
        if same:
            return same[-1], False
        return (found[-1], True) if found else (None, False)


def scores(data: Snapshot) -> Scores:
    stored = Stored(data.evaluations)
    columns = _columns(data, stored)
    rows = [
        HeatRow(version, standing(data, version), [_cell(stored, version, column) for column in columns])
        for version in data.own_versions
    ]
    cells = [cell for row in rows for cell in row.cells]
    metrics, note = _metrics(data, stored)
    return Scores(
        columns=columns,
        rows=rows,
        missing=sum(cell.score is None for cell in cells),
        other_settings=sum(cell.other_settings for cell in cells),
        metrics=metrics,
        metrics_note=note,
    )


def _columns(data: Snapshot, stored: Stored) -> list[Column]:
    """The newest version of every suite, and older ones on which a version of this model was measured.

    Tasks stand in the order in which they were learned; those never learned come last.
    """
    newest = {entry.name: entry.digest for entry in data.suites}
    own = data.own_versions

    def wanted(suite: AssetEntry) -> bool:
        return newest[suite.name] == suite.digest or any(stored.newest(v, suite)[0] for v in own)

    def learned(column: Column) -> int:
        return next((v.number for v in own if column.task in v.record.tasks), len(own) + 1)

    found = [
        Column(suite, task) for suite in data.suites if wanted(suite) for task in suite.record.facts["tasks"]
    ]
    return sorted(found, key=learned)


def _cell(stored: Stored, version: VersionEntry, column: Column) -> Cell:
    found, other = stored.newest(version, column.suite)
    if found is None:
        return Cell(None)
    summary = found.record.summary
    return Cell(summary["tasks"][column.task], other, summary.get("unit"))


def _metrics(data: Snapshot, stored: Stored) -> tuple[list[Metric], str]:
    """ACC, BWT, FWT and forgetting of the champion's line: each that the stored scores allow."""
    champion = data.champion
    if champion is None:
        return [], "There is no champion yet, so there is no released line to measure."
    absent: dict[str, None] = {}

    def score(version: VersionEntry, suite: AssetEntry, task: str) -> float | None:
        entry, other_settings = stored.newest(version, suite)
        if entry is not None and not other_settings:
            return float(entry.record.summary["tasks"][task])
        absent[f"{version.label} on {suite.name}"] = None
        return None

    line = _line(data, champion)
    try:
        found = line_matrix(score, line, data.suites, deltas=False)
    except BadInput:
        return [], f"{champion.label} and its ancestors learned no task that a suite tests."
    lacks = f"needs {wording.joined(list(absent))}, not measured" if absent else ""
    one = "needs two learned tasks" if len(found.tasks) < 2 else ""
    metrics = [
        _metric(key, getattr(found.matrix, key), one if key in ("bwt", "fwt") and one else lacks)
        for key in ("acc", "bwt", "fwt", "forgetting")
    ]
    names = " → ".join(version.label for version in line)
    return metrics, f"The released line is {names}; tasks in the order learned: {', '.join(found.tasks)}."


def _metric(key: str, value: float | None, why_not: str) -> Metric:
    name, meaning = wording.METRICS[key]
    if value is None:
        return Metric(name, meaning, "", why_not)
    return Metric(name, meaning, percent_or_points(key, value), "")


def percent_or_points(key: str, value: float) -> str:
    if key == "acc":
        return wording.percent(value)
    shown = wording.points(value)
    return f"{shown.removeprefix('+') if key == 'forgetting' else shown} points"


def _line(data: Snapshot, version: VersionEntry) -> list[VersionEntry]:
    """The version's ancestors within its model and itself, oldest first."""
    line, queue = [], [version.digest]
    while queue:
        entry = data.versions.get(queue.pop(0))
        if entry and entry.model == version.model and entry not in line:
            line.append(entry)
            queue += entry.record.parents
    return line[::-1]
