"""Evaluations of versions: computed once per (content, suite, engine), stored with every item's result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Row, insert, select

from meristem._quiet import quiet_libraries
from meristem.config import EvaluationSettings
from meristem.ecosystem import checkouts, retirement, scratch
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.records import Evaluation
from meristem.ecosystem.versions import VersionEntry
from meristem.engine.identity import EngineSettings, engine_digest, engine_document
from meristem.errors import BadInput
from meristem.evaluation.comparison import Comparison, compare
from meristem.evaluation.journal import journal_at
from meristem.evaluation.results import ItemResult
from meristem.evaluation.run import evaluate, prepare
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
    """An evaluation that is in the store. ``seconds``: that its items took, without loading the model; ``cached``: not
    computed by this call."""

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
        self._loaded: tuple[str, str | None, Engine] | None = None

    def evaluate(
        self, version: VersionEntry, suite: AssetEntry, expert: str | None = None
    ) -> EvaluationEntry:
        """The evaluation of ``version`` on ``suite``: from the store, or computed now and stored whole.

        ``expert``: answered by that task's expert alone (an evaluation of its own); ``BadInput`` where there is none.
        """
        settings = replace(self.settings, expert=expert)
        key = (version.content, suite.record.facts["digest"], engine_digest(settings))
        found = self._find(key)
        if found is not None:
            return found
        report, label = self.progress, f"{version.label} on {suite.name}"
        step = (lambda done, total: report(label, done, total, "")) if report else None
        loaded = load_suite_asset(self.store, suite)
        prepare(loaded)  # before a model is loaded
        with journal_at(scratch.journal(self.store, key)) as journal:
            # not counted: only the first suite of a version pays for it
            engine = self._engine(version.content, expert)
            journal.start()
            results = evaluate(engine, loaded, step, journal, prepared=True)
            return self._record(key, version, suite, results, settings, engine.template, journal.seconds)

    def task_score(self, version: VersionEntry, suite: AssetEntry, task: str) -> float:
        """Mean score of ``version`` on one task of ``suite``, measured now if it was not before."""
        return float(self.evaluate(version, suite).record.summary["tasks"][task])

    def results(self, entry: EvaluationEntry) -> list[ItemResult]:
        stored: list[ItemResult] = parse(self.store.read_blob(entry.record.results))
        return stored

    def compare(
        self,
        old: EvaluationEntry,
        new: EvaluationEntry,
        confidence: float = 0.95,
        *,
        slice_: str | None = None,
    ) -> Comparison:
        """Paired comparison, of the items of one slice if asked.

        Raises ``BadInput`` when suite, engine or chat template differ, saying which, and for a slice without items.
        """
        if told := "; ".join(differences(old.record, new.record)):
            raise BadInput(f"not comparable: {told}; evaluate both versions under one")
        before, after = self.results(old), self.results(new)
        if slice_ is not None:
            before, after = ([row for row in rows if row["slice"] == slice_] for rows in (before, after))
            if not before:
                known = ", ".join(sorted(old.record.summary["slices"])) or "none"
                raise BadInput(f"the suite has no slice {slice_!r}; its slices: {known}")
        return compare(old=before, new=after, confidence=confidence)

    def release_memory(self) -> None:
        """Drop the loaded model (before training loads its own)."""
        self._loaded = None

    def _engine(self, content: str, expert: str | None) -> Engine:
        if self._loaded is None or self._loaded[:2] != (content, expert):
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
                    expert=expert,
                )
            self._loaded = (content, expert, engine)
        return self._loaded[2]

    def _find(self, key: tuple[str, str, str]) -> EvaluationEntry | None:
        with self.store.database.read() as connection:
            return _stored(connection, key)

    def _record(
        self,
        key: tuple[str, str, str],
        version: VersionEntry,
        suite: AssetEntry,
        results: list[ItemResult],
        settings: EngineSettings,
        template: str | None,
        seconds: float,
    ) -> EvaluationEntry:
        body = Blob.file(canonical(results))
        stored = self.store.put([body])
        record = Evaluation(
            content=key[0],
            suite=key[1],
            engine=key[2],
            settings={**engine_document(settings), "template": template},
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


def differences(old: Evaluation, new: Evaluation) -> list[str]:
    """Why two evaluations cannot be compared item by item, one line each: suite, engine setting, chat template."""
    found = []
    if old.suite != new.suite:
        found.append(f"the suites differ ({_short(old.suite)} and {_short(new.suite)})")
    if old.settings.get("template") != new.settings.get("template"):
        templates = " and ".join(_short(e.settings.get("template")) for e in (old, new))
        found.append(f"the chat templates differ ({templates})")
    if old.summary.get("judges") != new.summary.get("judges"):
        judges = " and ".join(", ".join(e.summary.get("judges", ["nobody"])) for e in (old, new))
        found.append(f"the judges differ ({judges})")
    if old.engine != new.engine:
        before, after = (_flat(evaluation.settings) for evaluation in (old, new))
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        told = ", ".join(
            f"{k} {before.get(k)} and {after.get(k)}" for k in changed if k not in ("schema", "template")
        )
        found.append(f"the engines differ ({told})")
    return found


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **settings.get("libraries", {}), "libraries": None}


def _short(digest: str | None) -> str:
    return f"{digest[:19]}..." if digest else "none"


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
    slices = sorted({item.slice for task in suite.tasks for item in task.items if item.slice})
    facts = {
        "digest": suite.digest,
        "items": suite.size,
        "tasks": [task.name for task in suite.tasks],
        "kinds": sorted({task.kind for task in suite.tasks}),
        **({"slices": slices} if slices else {}),
        **({"unit": suite.unit} if suite.unit != "share" else {}),
    }
    return body, facts


def summary(results: list[ItemResult]) -> dict[str, Any]:
    """Mean score over all items, per task, and per slice; what else a type of task counts, where it does.

    ``unit`` of the scores unless they are shares; ``truncated``: items whose prompt had no room; ``unfinished`` and
    ``unreadable``: texts without an end, and judgements that said nothing; ``judges``: the models that answered as
    judge; per perplexity task ``bits_per_byte``: all its bits over all its bytes (the score is a mean over items).
    """

    tasks: dict[str, list[float]] = {}
    slices: dict[str, list[float]] = {}
    for row in results:
        tasks.setdefault(row["task"], []).append(row["score"])
        if row["slice"]:
            slices.setdefault(row["slice"], []).append(row["score"])
    return {
        "items": len(results),
        "score": _mean([row["score"] for row in results]),
        "tasks": {task: _mean(scores) for task, scores in sorted(tasks.items())},
        "slices": {name: _mean(scores) for name, scores in sorted(slices.items())},
        **_counts(results),
    }


def _mean(scores: list[float]) -> float:
    return round(sum(scores) / len(scores), 6)


def _counts(results: list[ItemResult]) -> dict[str, Any]:
    """Only what there is to say: the summary of a plain suite keeps its bytes."""
    details = [row["detail"] for row in results]
    texts = [sample for detail in details for sample in detail.get("samples", [detail])]
    judgements = [text["judge"] for text in texts if "judge" in text]
    sizes: dict[str, list[float]] = {}
    for row in results:
        if "bits" in row["detail"]:
            bits, size = sizes.setdefault(row["task"], [0.0, 0])
            sizes[row["task"]] = [bits + row["detail"]["bits"], size + row["detail"]["bytes"]]
    said = {
        "unit": results[0].get("unit"),
        "truncated": sum("truncated" in detail for detail in details),
        "unfinished": sum(detail.get("unfinished", 0) for detail in details),
        "unreadable": sum("unreadable" in judgement for judgement in judgements),
        "judges": sorted({judgement["model"] for judgement in judgements if judgement.get("model")}),
        "bits_per_byte": {task: round(bits / size, 6) for task, (bits, size) in sorted(sizes.items())},
    }
    return {key: value for key, value in said.items() if value}
