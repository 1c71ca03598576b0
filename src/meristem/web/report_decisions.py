"""Decisions with their gates, the paired comparisons behind them, and the answers that got worse."""

from __future__ import annotations

from dataclasses import dataclass

from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import GateResult, Plan, Release, Signal
from meristem.errors import BadInput, Tampered
from meristem.evaluation.comparison import Comparison
from meristem.evaluation.exports.scales import Scale, scale
from meristem.evaluation.results import ItemResult
from meristem.evaluation.service import EvaluationEntry, load_suite_asset
from meristem.web import wording
from meristem.web.report_data import Snapshot

MOST_FLIPS = 12


@dataclass(frozen=True)
class Threshold:
    """A line that the interval must stay right of: score units, with the gate that draws it."""

    value: float
    words: str


@dataclass(frozen=True)
class Flip:
    """An item that the champion answered right and the candidate wrong."""

    name: str
    slice: str | None
    context: str
    prompt: str
    expected: str
    old: str
    new: str


@dataclass(frozen=True)
class SuiteComparison:
    """``bounds`` are the one-sided ones at ``confidence`` that the gates use. ``problem``: why none."""

    suite: str
    comparison: Comparison | None
    bounds: tuple[float, float]
    confidence: float
    thresholds: list[Threshold]
    flips: list[Flip]
    problem: str = ""

    @property
    def scale(self) -> Scale:
        return scale(self.comparison.unit if self.comparison else None)


@dataclass(frozen=True)
class DecisionView:
    id: str
    outcome: str
    candidate: str
    champion: str
    when: str
    actor: str
    sentence: str
    after: str
    why: list[str]
    methods: list[str]
    approvals: tuple[str, ...]
    approvals_needed: int
    gates: list[GateResult]
    suites: list[SuiteComparison]

    def scale_of(self, suite: str) -> Scale:
        return next((found.scale for found in self.suites if found.suite == suite), scale(None))


def decisions(data: Snapshot) -> list[DecisionView]:
    """Newest first."""
    return [_view(data, index) for index in reversed(range(len(data.decisions)))]


def latest_sentence(data: Snapshot) -> str:
    """What the newest decision said and what became of it, for the head of the page."""
    if not data.decisions:
        return "No update of this model has been judged yet."
    last = data.decisions[-1]
    after = _after(data, last.entry.digest, last.record.version, last.outcome)
    return f"{_sentence(data, len(data.decisions) - 1)} {after}"


def _view(data: Snapshot, index: int) -> DecisionView:
    found = data.decisions[index]
    record = found.record
    event = data.times.get(("decision.opened", found.entry.digest))
    version = data.versions[record.version]
    return DecisionView(
        id=found.id,
        outcome=record.outcome,
        candidate=version.label,
        champion=data.label(record.champion),
        when=wording.moment(event.time) if event else "",
        actor=event.actor if event else "",
        sentence=_sentence(data, index),
        after=_after(data, found.entry.digest, record.version, record.outcome),
        why=_why(data, record.plan),
        methods=data.methods(version.record.recipe),
        approvals=found.approvals,
        approvals_needed=record.approvals_needed,
        gates=record.gates,
        suites=_suites(data, index),
    )


def _sentence(data: Snapshot, index: int) -> str:
    record = data.decisions[index].record
    new, old = data.label(record.version), data.label(record.champion)
    open_ = [f"{wording.gate_title(g.gate)} on {g.suite}" for g in record.gates if g.outcome != "pass"]
    if record.outcome == "pass":
        gates = wording.plural(len(record.gates), "gate")
        return f"{new} passed {'the only gate' if len(record.gates) == 1 else f'all {gates}'} against {old}."
    if record.outcome == "fail":
        failed = [f"{wording.gate_title(g.gate)} on {g.suite}" for g in record.gates if g.outcome == "fail"]
        return f"{new} was blocked: against {old} it failed {wording.joined(failed)}."
    return f"{new} was not released: the tests could not settle {wording.joined(open_)} against {old}."


def _after(data: Snapshot, decision: str, version: str, outcome: str) -> str:
    """What happened to the decided version since."""
    told, promoted = [], False
    for entry in data.own_releases:
        release = entry.as_(Release)
        if release.kind == "promote" and release.decision == decision:
            told.append(f"It became the champion ({entry.id})")
            promoted = True
        elif promoted and release.kind == "rollback" and release.previous == version:
            told.append(f"it was rolled back to {data.label(release.version)} ({entry.id})")
    if told:
        return "; ".join(told) + "."
    if outcome == "pass":
        return "It has not been released."
    return "The champion stayed as it was."


def _why(data: Snapshot, plan: str | None) -> list[str]:
    """The plan's reason and the signals that it answers."""
    entry = next((e for e in data.ws.records("plan", data.model.name) if e.digest == plan), None)
    if entry is None:
        return []
    record = entry.as_(Plan)
    signals = [e for e in data.ws.records("signal", data.model.name) if e.digest in record.signals]
    notes = [f"{e.id} ({e.as_(Signal).kind}): {e.as_(Signal).note or 'no note'}" for e in signals]
    taught = [data.asset_labels.get(digest, digest) for digest in record.data]
    told = [f"{entry.id}: {record.reason}"] + ([f"new data: {wording.joined(taught)}"] if taught else [])
    return told + notes


def _suites(data: Snapshot, index: int) -> list[SuiteComparison]:
    record = data.decisions[index].record
    names = list(dict.fromkeys(gate.suite for gate in record.gates))
    used = [entry for entry in data.evaluations if entry.digest in record.evaluations]
    old, new = data.versions[record.champion].content, data.versions[record.version].content
    found = []
    for name in names:
        gates = [gate for gate in record.gates if gate.suite == name]
        try:
            suite, before, after = _pair(data, used, name, old, new)
            found.append(_compared(data, gates, suite, before, after))
        except (BadInput, Tampered) as error:
            found.append(SuiteComparison(name, None, (0.0, 0.0), 0.95, [], [], str(error)))
    return found


def _pair(
    data: Snapshot, used: list[EvaluationEntry], name: str, old: str, new: str
) -> tuple[AssetEntry, EvaluationEntry, EvaluationEntry]:
    """The suite and the two evaluations that a decision pinned for it."""
    for suite in reversed([entry for entry in data.suites if entry.name == name]):
        mine = [entry for entry in used if entry.record.suite == suite.record.facts["digest"]]
        before = [entry for entry in mine if entry.record.content == old]
        after = [entry for entry in mine if entry.record.content == new]
        if before and after:
            return suite, before[-1], after[-1]
    raise BadInput("the evaluations behind this gate are not in the store")


def _compared(
    data: Snapshot, gates: list[GateResult], suite: AssetEntry, old: EvaluationEntry, new: EvaluationEntry
) -> SuiteComparison:
    evaluator = data.ws.evaluator()
    comparison = evaluator.compare(old, new)
    confidence = next((gate.numbers["confidence"] for gate in gates if "confidence" in gate.numbers), 0.95)
    flips = _flips(data, suite, comparison, evaluator.results(old), evaluator.results(new))
    bounds = comparison.bounds(confidence)
    return SuiteComparison(suite.name, comparison, bounds, confidence, _thresholds(gates), flips)


def _thresholds(gates: list[GateResult]) -> list[Threshold]:
    found = []
    for gate in gates:
        if "margin" in gate.numbers:
            found.append(
                Threshold(-gate.numbers["margin"], f"margin {wording.points(-gate.numbers['margin'])}")
            )
        if "min_gain" in gate.numbers:
            found.append(Threshold(gate.numbers["min_gain"], _gain_words(gate.numbers["min_gain"])))
    return list(dict.fromkeys(found))


def _gain_words(gain: float) -> str:
    return f"must exceed {wording.points(gain)}" if gain else "must exceed 0"


def _flips(
    data: Snapshot, suite: AssetEntry, comparison: Comparison, old: list[ItemResult], new: list[ItemResult]
) -> list[Flip]:
    wanted = set(comparison.flipped[:MOST_FLIPS])
    if not wanted:
        return []
    items = {
        f"{task.name}/{item.id}": item
        for task in load_suite_asset(data.ws.store, suite).tasks
        for item in task.items
    }
    after = {f"{row['task']}/{row['id']}": row for row in new}
    flips = []
    for row in old:
        name = f"{row['task']}/{row['id']}"
        if name in wanted:
            *context, last = items[name].messages
            flips.append(
                Flip(
                    name=name,
                    slice=row["slice"],
                    context=wording.clipped("\n".join(f"{m.role}: {m.content}" for m in context)),
                    prompt=wording.clipped(last.content),
                    expected=wording.clipped(row["answer"], 300),
                    old=wording.clipped(row["prediction"], 300),
                    new=wording.clipped(after[name]["prediction"], 300),
                )
            )
    return flips
