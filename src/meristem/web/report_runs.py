"""Training runs, what everything cost, and the evidence trail."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meristem.ecosystem.records import Release
from meristem.web import wording
from meristem.web.report_data import Snapshot, short, standing

MOST_EVENTS = 1000
_PENALTY = "/penalty"


@dataclass(frozen=True)
class Run:
    """An update with its curves: series name -> points (step, value)."""

    id: str
    status: str
    made: str
    parent: str
    fate: str
    methods: list[str]
    data: list[str]
    loss: list[tuple[float, float]]
    penalties: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Cost:
    order: int
    when: str
    kind: str
    what: str
    seconds: float | None
    steps: int | None
    tokens: int | None
    items: int | None


@dataclass(frozen=True)
class Row:
    """An event as the trail shows it."""

    sequence: int
    when: str
    actor: str
    kind: str
    subject: str
    reason: str


@dataclass(frozen=True)
class Return:
    """The champion that a rollback would bring back."""

    current: str
    target: str


def runs(data: Snapshot) -> list[Run]:
    found = []
    for update in data.updates:
        curve = update.outcome.curve if update.outcome else []
        keys = sorted({key for point in curve for key in point if key.endswith(_PENALTY)})
        found.append(
            Run(
                id=update.id,
                status=update.entry.status,
                made=update.made.label if update.made else "",
                parent=data.label(update.record.parent),
                fate=standing(data, update.made).words if update.made else "",
                methods=data.methods(update.record.recipe),
                data=[data.asset_labels.get(digest, short(digest)) for digest in update.record.data],
                loss=_series(curve, "loss"),
                penalties={key.removesuffix(_PENALTY): _series(curve, key) for key in keys},
            )
        )
    return found


def _series(curve: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """Finite points only; a curve without steps counts its points."""
    points = [(point.get("step", index + 1), point[key]) for index, point in enumerate(curve) if key in point]
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def costs(data: Snapshot) -> list[Cost]:
    """Updates of the model and evaluations of its versions, in the order they were finished."""
    return sorted([*_update_costs(data), *_evaluation_costs(data)], key=lambda cost: (cost.order, cost.what))


def _update_costs(data: Snapshot) -> list[Cost]:
    found = []
    for update in data.updates:
        event = data.times.get((f"update.{update.entry.status}", update.entry.digest)) or data.times.get(
            ("update.opened", update.entry.digest)
        )
        made = update.made.label if update.made else f"{update.entry.status}, no version yet"
        outcome = update.outcome
        found.append(
            Cost(
                order=event.sequence if event else 0,
                when=wording.moment(event.time) if event else "",
                kind="update",
                what=f"{update.id} → {made}",
                seconds=outcome.seconds if outcome else None,
                steps=outcome.steps if outcome else None,
                tokens=outcome.tokens if outcome else None,
                items=None,
            )
        )
    return found


def _evaluation_costs(data: Snapshot) -> list[Cost]:
    labels = {version.content: version.label for version in reversed(data.own_versions)}
    suites = {entry.record.facts["digest"]: entry.label for entry in data.suites}
    found = []
    for entry in data.evaluations:
        if entry.record.content not in labels:
            continue
        event = data.times.get(("evaluation.recorded", entry.digest))
        suite = suites.get(entry.record.suite, short(entry.record.suite))
        found.append(
            Cost(
                order=event.sequence if event else 0,
                when=wording.moment(event.time) if event else "",
                kind="evaluation",
                what=f"{labels[entry.record.content]} on {suite}",
                seconds=entry.seconds,
                steps=None,
                tokens=None,
                items=entry.record.summary.get("items"),
            )
        )
    return found


def trail(data: Snapshot) -> list[Row]:
    """The newest events of the workspace, newest first."""
    newest = data.events[::-1][:MOST_EVENTS]
    return [
        Row(
            e.sequence,
            wording.moment(e.time),
            e.actor,
            e.kind,
            short(e.subject),
            wording.clipped(e.reason, 300),
        )
        for e in newest
    ]


def way_back(data: Snapshot) -> Return | None:
    """What ``release rollback`` would do now: the champion that the promotion of the present one replaced."""
    champion = data.champion
    if champion is None:
        return None
    for entry in reversed(data.own_releases):
        release = entry.as_(Release)
        if release.kind == "promote" and release.version == champion.digest:
            return Return(champion.label, data.label(release.previous))
    return None
