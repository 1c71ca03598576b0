"""One evaluation as one JSON document: what was measured, on what, with what, and every item's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.versions import VersionEntry
from meristem.evaluation.calibration import calibration
from meristem.evaluation.cost import cost
from meristem.evaluation.results import ItemResult
from meristem.evaluation.sample import RIGHT
from meristem.evaluation.service import EvaluationEntry, load_suite_asset
from meristem.evaluation.suites import Suite
from meristem.store.canonical import parse
from meristem.store.evidence import Event
from meristem.store.schema import events
from meristem.store.store import Store

SCHEMA = "meristem/evaluation-export/v1"


@dataclass(frozen=True)
class Measured:
    """An evaluation with everything that an export or a page says about it. ``event``: of its recording."""

    version: VersionEntry
    asset: AssetEntry
    suite: Suite
    entry: EvaluationEntry
    results: list[ItemResult]
    event: Event | None

    def identity(self) -> dict[str, Any]:
        """Model, suite, engine and recording by name and digest; without the scores."""
        record, event = self.entry.record, self.event
        return {
            "evaluation": self.entry.digest,
            "results": record.results,
            "model": {
                "version": self.version.label,
                "digest": self.version.digest,
                "content": self.version.content,
            },
            "suite": {"name": self.asset.label, "asset": self.asset.digest, "digest": record.suite},
            "engine": {"digest": record.engine, "settings": record.settings},
            "recorded": event
            and {"time": event.time, "actor": event.actor, "tool": event.tool, "event": event.sequence},
        }

    def to_document(self) -> dict[str, Any]:
        """The whole evaluation. Items stand in the suite's order, as they are stored."""
        return {
            "schema": SCHEMA,
            **self.identity(),
            "cost": cost(self.results, self.entry.seconds).to_document(),
            "calibration": stated.to_document() if (stated := calibration(self.results)) else None,
            "summary": self.entry.record.summary,
            "items": self.results,
        }


def measured(store: Store, version: VersionEntry, asset: AssetEntry, entry: EvaluationEntry) -> Measured:
    """Read from the store what belongs to ``entry``. Raises ``BadInput`` for a suite that was given up."""
    query = select(events.c.body).where(
        (events.c.subject == entry.digest) & (events.c.kind == "evaluation.recorded")
    )
    with store.database.read() as connection:
        body = connection.scalar(query.order_by(events.c.sequence).limit(1))
    results: list[ItemResult] = parse(store.read_blob(entry.record.results))
    suite = load_suite_asset(store, asset)
    return Measured(version, asset, suite, entry, results, Event.from_body(body) if body else None)


def is_share(row: ItemResult) -> bool:
    """Whether a score runs from 0 (wrong) to 1 (right); other units know no right and wrong."""
    return "unit" not in row


def is_right(row: ItemResult) -> bool:
    return not is_share(row) or row["score"] >= RIGHT
