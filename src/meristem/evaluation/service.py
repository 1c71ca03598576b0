"""Evaluations of versions: computed once per (content, suite, engine), stored with every item's result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Row, insert, select

from meristem._quiet import quiet_libraries
from meristem.config import EvaluationSettings
from meristem.ecosystem import checkouts, retirement
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import Evaluation
from meristem.ecosystem.versions import VersionEntry
from meristem.engine.identity import EngineSettings, engine_digest, engine_document
from meristem.errors import BadInput
from meristem.evaluation.comparison import Comparison, compare
from meristem.evaluation.results import ItemResult
from meristem.evaluation.run import evaluate
from meristem.evaluation.suites import Suite
from meristem.store.canonical import canonical, parse
from meristem.store.packs import Blob
from meristem.store.schema import evaluations as table
from meristem.store.store import Store, read_document

if TYPE_CHECKING:
    from meristem.engine.load import Engine

SUITE_FILE = "suite.json"
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class EvaluationEntry:
    """An evaluation that is in the store, with the seconds that it took; ``cached``: not computed by this call."""

    digest: str
    record: Evaluation
    seconds: float
    cached: bool


class Evaluator:
    """Evaluates versions of one workspace with one engine's settings; keeps the last model in memory."""

    def __init__(
        self, store: Store, settings: EvaluationSettings, actor: str, progress: Progress | None = None
    ):
        self.store, self.actor, self.progress = store, actor, progress
        self.settings = EngineSettings(
            dtype=settings.dtype, device=settings.device, batch_tokens=settings.batch_tokens
        )
        self._loaded: tuple[str, Engine] | None = None

    def evaluate(self, version: VersionEntry, suite: AssetEntry) -> EvaluationEntry:
        """The evaluation of ``version`` on ``suite``: from the store, or computed now and stored whole."""
        key = (version.content, suite.record.facts["digest"], engine_digest(self.settings))
        found = self._find(key)
        if found is not None:
            return found
        started = time.monotonic()
        report, label = self.progress, f"{version.label} on {suite.name}"
        step = (lambda done, total: report(label, done, total, "")) if report else None
        results = evaluate(self._engine(version.content), load_suite_asset(self.store, suite), step)
        return self._record(key, version, suite, results, time.monotonic() - started)

    def task_score(self, version: VersionEntry, suite: AssetEntry, task: str) -> float:
        """Mean score of ``version`` on one task of ``suite``, measured now if it was not before."""
        return float(self.evaluate(version, suite).record.summary["tasks"][task])

    def results(self, entry: EvaluationEntry) -> list[ItemResult]:
        stored: list[ItemResult] = parse(self.store.read_blob(entry.record.results))
        return stored

    def compare(self, old: EvaluationEntry, new: EvaluationEntry, confidence: float = 0.95) -> Comparison:
        """Paired comparison. Raises ``BadInput`` when suite or engine differ, saying which."""
        for what in ("suite", "engine"):
            if getattr(old.record, what) != getattr(new.record, what):
                raise BadInput(f"the two evaluations used different {what}s; evaluate both again under one")
        return compare(old=self.results(old), new=self.results(new), confidence=confidence)

    def release_memory(self) -> None:
        """Drop the loaded model (before training loads its own)."""
        self._loaded = None

    def _engine(self, content: str) -> Engine:
        if self._loaded is None or self._loaded[0] != content:
            from meristem.engine.load import load

            self._loaded = None
            here = checkouts.cached(self.store, content)
            with quiet_libraries():
                engine = load(
                    here.folder,
                    base_folder=here.base_folder,
                    dtype=self.settings.dtype,
                    device=self.settings.device,
                    batch_tokens=self.settings.batch_tokens,
                )
            self._loaded = (content, engine)
        return self._loaded[1]

    def _find(self, key: tuple[str, str, str]) -> EvaluationEntry | None:
        with self.store.database.read() as connection:
            return _stored(connection, key)

    def _record(
        self,
        key: tuple[str, str, str],
        version: VersionEntry,
        suite: AssetEntry,
        results: list[ItemResult],
        seconds: float,
    ) -> EvaluationEntry:
        body = Blob.file(canonical(results))
        stored = self.store.put([body])
        record = Evaluation(
            content=key[0],
            suite=key[1],
            engine=key[2],
            settings=engine_document(self.settings),
            results=body.digest,
            summary=summary(results),
        )
        seconds = round(seconds, 3)
        with self.store.transaction(self.actor, f"{version.label} evaluated on {suite.label}") as tx:
            raced = _stored(tx.connection, key)
            if raced:  # another process computed the same meanwhile
                return raced
            tx.add_blobs(stored)
            digest = tx.add_document(record.document())
            tx.connection.execute(
                insert(table).values(
                    content=key[0], suite=key[1], engine=key[2], document=digest, seconds=seconds
                )
            )
            tx.append(
                "evaluation.recorded",
                digest,
                content=key[0],
                suite=key[1],
                engine=key[2],
                results=body.digest,
                seconds=seconds,
            )
        return EvaluationEntry(digest, record, seconds, False)


def _stored(connection: Connection, key: tuple[str, str, str]) -> EvaluationEntry | None:
    where = (table.c.content == key[0]) & (table.c.suite == key[1]) & (table.c.engine == key[2])
    row = connection.execute(select(table).where(where)).first()
    return _entry(connection, row) if row else None


def stored_evaluations(store: Store) -> list[EvaluationEntry]:
    """Every evaluation that the store holds, in the order of their keys."""
    with store.database.read() as connection:
        query = select(table).order_by(table.c.content, table.c.suite, table.c.engine)
        return [_entry(connection, row) for row in connection.execute(query).all()]


def _entry(connection: Connection, row: Row) -> EvaluationEntry:
    record = Evaluation.from_document(read_document(connection, row.document))
    return EvaluationEntry(row.document, record, row.seconds, True)


def load_suite_asset(store: Store, suite: AssetEntry) -> Suite:
    """Raises ``BadInput`` for a suite that a retention rule gave up."""
    with store.database.read() as connection:
        retirement.refuse(connection, suite.digest)
    return Suite.from_document(parse(store.read_blob(suite.record.files[SUITE_FILE])))


def suite_asset(name: str, suite: Suite) -> tuple[Blob, dict[str, Any]]:
    """The blob and the facts under which a suite is stored."""
    body = Blob.file(canonical(suite.to_document()))
    facts = {
        "digest": suite.digest,
        "items": suite.size,
        "tasks": [task.name for task in suite.tasks],
        "kinds": sorted({task.kind for task in suite.tasks}),
    }
    return body, facts


def summary(results: list[ItemResult]) -> dict[str, Any]:
    """Mean score over all items, per task, and per slice."""

    def mean(rows: list[ItemResult]) -> float:
        return round(sum(row["score"] for row in rows) / len(rows), 6)

    tasks = sorted({row["task"] for row in results})
    slices = sorted({row["slice"] for row in results if row["slice"]})
    return {
        "items": len(results),
        "score": mean(results),
        "tasks": {task: mean([r for r in results if r["task"] == task]) for task in tasks},
        "slices": {name: mean([r for r in results if r["slice"] == name]) for name in slices},
    }
